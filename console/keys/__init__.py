"""nightsplit keys: certificates, users and permissions of the participants, made at the coordinating centre.

keys/
  authority/           signs certificates; keep it on a machine without workers
  centre/              for broker and store: certificate, users, configuration
    server/            for the server worker
  sites/<name>/        folder for a hospital
"""
