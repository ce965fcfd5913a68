"""What stands in the files that are handed over; {name}, {broker}, {store} and {vhost} are filled in."""

_ACCESS = """\
broker = "amqps://{name}@{broker}/{vhost}"
store = "rediss://{name}@{store}/0"
ca = "ca.pem"
certificate = "certificate.pem"
key = "key.pem"
password = "password"
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
{_ACCESS}# Checkpoints. In a container: "/state"
state = "state"
# Works at night alone:
# shift = "22:00-06:00 Europe/Berlin"

# Where the patients' data is. Nothing of this table leaves the hospital.
[data]
source = "table"
path = "data.csv"
label = "label"
"""

POLICY_TOML = """\
# What may leave this hospital, and what is obeyed here. No run can weaken it; whoever answers for the data decides.
# Of "labels", "activations", "stored_activations", "gradients", "weights", "counts" and "ciphertext"; what each of
# them tells of patients: docs/reference/configuration.md
allowed = ["activations", "gradients", "counts"]
server_sets_weights = false  # weights that the server sends replace those of layers that work here
tape = false                 # the server keeps every message that it receives
min_batch = 8                # samples in a message that holds any, at least
"""

SITE_README = """\
# nightsplit at {name}

This folder lets the worker of {name} log in at the coordinating centre. Keep it where the worker runs and
nowhere else: whoever holds `key.pem` and `password` can speak as {name}. If it is lost, have the centre
revoke it (`nightsplit keys revoke {name}`) and make another.

| file | what it is |
| --- | --- |
| `ca.pem` | by this the worker recognises the centre |
| `certificate.pem`, `key.pem`, `password` | by these the centre recognises the worker |
| `site.toml` | how the worker works: **say here where your data is** |
| `policy.toml` | what may leave: **say here what you allow.** No labels and no weights, as it stands |
| `run.toml` | what is trained; the same at every participant. The centre sends it, and it belongs here |

1. Connections go out alone, to {broker} and {store}; no port has to be opened here.
2. `nightsplit doctor site.toml` says what is still missing.
3. `nightsplit site site.toml` works; stop it at any time, start it again, and it goes on.

Or with containers: copy this folder to `config/` beside `examples/site/compose.yaml`, say `state = "/state"`
in site.toml, and `docker compose up -d`.
"""
