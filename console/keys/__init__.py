"""nightsplit keys: who may take part, as certificates, users and rights. Used at the coordinating centre.

keys/
  authority/           signs certificates; keep it where no worker runs
  centre/              for broker and store: certificate, users, configuration
    server/            for the server worker
  sites/<name>/        one folder to hand to a hospital
"""
