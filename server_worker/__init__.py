"""Server worker, which learns from the messages of sites."""
