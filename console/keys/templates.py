"""Templates of a worker's files, with the fields {name}, {broker}, {store} and {vhost}."""

_ACCESS = """\
broker = "amqps://{name}@{broker}/{vhost}"
store = "rediss://{name}@{store}/0"
ca = "ca.pem"
certificate = "certificate.pem"
key = "key.pem"
password = "password"
identity = "identity.key"
"""

SERVER_TOML = f"""\
# The server worker: nightsplit server server.toml. All keys: docs/reference/configuration.md
[server]
run = "run.toml"
{_ACCESS}"""

SITE_TOML = f"""\
# This hospital's worker: nightsplit site site.toml. All keys: docs/reference/configuration.md
[site]
name = "{{name}}"
run = "run.toml"
policy = "policy.toml"
# Runs that this hospital has approved: nightsplit approve site.toml. In a container: "/state/approved.toml"
approvals = "approved.toml"
{_ACCESS}# Checkpoints. In a container: "/state"
state = "state"
# To work only at night:
# shift = "22:00-06:00 Europe/Berlin"

# The patients' data. Nothing in this table leaves the hospital.
[data]
source = "table"
path = "data.csv"
label = "label"
"""

POLICY_TOML = """\
# What messages of this hospital may reveal, decided by the person responsible for the data. No run can weaken it.
# Choose from "labels", "activations", "stored_activations", "gradients", "weights", "counts" and "ciphertext";
# docs/reference/configuration.md explains what each reveals about patients.
allowed = ["activations", "gradients", "counts"]
packages = []                # installed packages whose functions may build a network
server_sets_weights = false  # the server may replace the weights of this hospital's layers
tape = false                 # the server may keep every message that it receives
min_batch = 8                # smallest number of samples in a message
"""

SITE_README = """\
# nightsplit at {name}

With these files and the keys that {name} made itself (`nightsplit keys request`), the worker of {name} logs in at the
coordinating centre. Copy them beside these keys, on the machine of the worker. With `identity.key`, `key.pem` and
`password` anyone can act as {name}: if they are lost, have the centre revoke them (`nightsplit keys revoke {name}`).

| file | content |
| --- | --- |
| `ca.pem` | the certificate by which the worker recognises the centre |
| `certificate.pem`, `password` | with `key.pem`, the credentials by which the centre recognises the worker |
| `identity.key` | made at {name}, never copied: signs every message, so that nobody else can speak as {name} |
| `site.toml` | settings of the worker: **enter the path of your data** |
| `policy.toml` | what messages may reveal: **enter what you allow.** By default no labels and no weights |
| `run.toml` | the training, the same at every participant. The centre sends it; save it here |

1. The worker only opens connections, to {broker} and {store}; no port has to be opened for it.
2. `nightsplit keys show run.toml` spells the key of every participant. Compare yours and the server's by telephone.
3. `nightsplit approve site.toml` shows who would read what and which code would run, and asks. Nothing of a run is used
   before a person of {name} has approved it.
4. `nightsplit doctor site.toml` reports what is still missing.
5. `nightsplit site site.toml` runs the worker. Stop it at any time; start it again to continue.

Or with containers: copy this folder to `config/` beside `examples/site/compose.yaml`, set `state = "/state"`
and `approvals = "/state/approved.toml"` in site.toml, and follow the same steps (`docker compose run --rm site approve
/config/site.toml`, then `docker compose up -d`).
"""
