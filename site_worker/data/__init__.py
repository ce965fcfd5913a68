"""A site's data: read, divide by patient, scale, augment. Nothing in here sends anything."""
