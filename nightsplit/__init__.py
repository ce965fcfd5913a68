"""nightsplit: asynchronous split learning for hospitals over a message broker.

The packages `broker`, `shared`, `site_worker`, `server_worker`, `simulation` and `console` stand at the top of the
repository and are linked here, so that everything installs and imports as `nightsplit.*`. A name such as `shared` is
too common to be a package of its own beside a user's code.
"""
