# One image for every worker: nightsplit server ..., nightsplit site ..., nightsplit keys ...
# TORCH_INDEX names one more wheel index for torch alone, as in the Makefile. Without it pip takes the
# default wheel, which on Linux brings CUDA (GB more); an index of CPU wheels makes the small image, and an
# index for another version of CUDA the image for that.
# PYTHON is the version of Python: 3.11, 3.12 or 3.13.
# EXTRAS names extras of pyproject.toml that a site needs, e.g. medical,privacy. A server needs none but he, to answer
# encrypted queries.
ARG PYTHON=3.13
FROM python:${PYTHON}-slim AS dependencies
ARG TORCH_INDEX=
RUN python -m venv /opt/nightsplit
ENV PATH=/opt/nightsplit/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} -c constraints.txt torch==2.13.0
# Without its packages the project installs its dependencies alone: a layer that a new source keeps.
ARG EXTRAS=
COPY pyproject.toml README.md ./
RUN pip install --no-cache-dir -c constraints.txt setuptools ".${EXTRAS:+[$EXTRAS]}" \
 && pip uninstall --yes --quiet nightsplit
# A quarter of it is for those who build torch, debug it, test these packages, or view a tensorboard.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends binutils \
 && cd /opt/nightsplit/lib/python3.*/site-packages \
 && strip --strip-unneeded torch/lib/libtorch_cpu.so \
 && rm -rf torch/test torch/include tensorboard_data_server/bin \
 && find torch/bin -type f ! -name torch_shm_manager -delete \
 && find . -type d -name tests -prune -exec rm -rf {} +

FROM python:${PYTHON}-slim
# The state of a worker. A named volume that is mounted here inherits the owner.
RUN useradd --uid 10001 --create-home nightsplit \
 && mkdir /state \
 && chown nightsplit:nightsplit /state
COPY --from=dependencies /opt/nightsplit /opt/nightsplit
ENV PATH=/opt/nightsplit/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib
# The example with its public data goes along. A hospital mounts its own files, read-only, in place of them.
COPY . /source
RUN pip install --no-cache-dir --no-deps --no-build-isolation /source \
 && python /source/examples/cholesterol/prepare.py \
 && mv /source/examples/cholesterol /example \
 && rm -rf /source
USER nightsplit
VOLUME /state
WORKDIR /state
ENTRYPOINT ["nightsplit"]
CMD ["--help"]
