# syntax=docker/dockerfile:1
# Image of `vlduet serve` with the locked packages, for a CPU; docs/operate.md describes its use.
#
#   docker build -t vlduet .
#   docker build -t vlduet --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   # for a GPU

FROM python:3.12.11-slim-bookworm AS build

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src

# The packages change less often than the code: their layer is kept.
COPY requirements/lock.txt requirements/torch.txt requirements/
RUN python -m venv /opt/vlduet \
    && /opt/vlduet/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements/lock.txt \
    && /opt/vlduet/bin/python -m pip install --quiet --no-deps --index-url "$TORCH_INDEX" -r requirements/torch.txt

COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/vlduet/bin/python -m pip install --quiet --no-deps --no-build-isolation . \
    && /opt/vlduet/bin/vlduet --version

FROM python:3.12.11-slim-bookworm

RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin vlduet
COPY --from=build /opt/vlduet /opt/vlduet

# Nothing is downloaded, and nothing is written outside of /tmp.
ENV PATH=/opt/vlduet/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["vlduet"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
