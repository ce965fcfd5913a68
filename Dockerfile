# One image for every worker: nightsplit server ..., nightsplit site ...
# TORCH_INDEX names one more wheel index for torch alone, as in the Makefile; CPU wheels save several GB.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=
RUN python -m venv /opt/nightsplit
WORKDIR /source
COPY constraints.txt ./
RUN /opt/nightsplit/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} \
    -c constraints.txt torch==2.13.0
# Without its packages the project installs its dependencies alone: a layer that a new source keeps.
COPY pyproject.toml README.md ./
RUN /opt/nightsplit/bin/pip install --no-cache-dir -c constraints.txt .
COPY . .
RUN /opt/nightsplit/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
 && /opt/nightsplit/bin/python examples/cholesterol/prepare.py

FROM python:3.11-slim
# The state of a worker. A named volume that is mounted here inherits the owner.
RUN useradd --uid 10001 --create-home nightsplit \
 && mkdir /state \
 && chown nightsplit:nightsplit /state
COPY --from=build /opt/nightsplit /opt/nightsplit
# The example with its public data. A hospital mounts its own files, read-only, in place of them.
COPY --from=build /source/examples/cholesterol /example
ENV PATH=/opt/nightsplit/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
USER nightsplit
VOLUME /state
WORKDIR /state
ENTRYPOINT ["nightsplit"]
CMD ["--help"]
