# r2 on a CPU: docker build -t r2 . && docker run --rm -v "$PWD:/work" r2 ptq model.safetensors
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY r2cli ./r2cli
COPY recipes ./recipes
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# From PyTorch's index for CPUs: the usual wheels bring gigabytes of CUDA.
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
# A user of another number, as --user gives, has no home of its own.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["r2"]
CMD ["--help"]
