# The official image of PostgreSQL with lockstep in it:
#   docker build --build-arg PG_MAJOR=18 -t lockstep .
#   docker run -e POSTGRES_PASSWORD=secret lockstep -c shared_preload_libraries=lockstep
ARG PG_MAJOR=18

FROM postgres:${PG_MAJOR}-bookworm AS build
# The image sets PG_MAJOR.
RUN apt-get update && apt-get install -y --no-install-recommends \
    ca-certificates clang curl gcc libc6-dev libclang-dev libssl-dev make pkg-config postgresql-server-dev-$PG_MAJOR
ENV CARGO_HOME=/usr/local/cargo
ENV RUSTUP_HOME=/usr/local/rustup
ENV PATH=/usr/local/cargo/bin:$PATH
RUN curl -sSf https://static.rust-lang.org/rustup/rustup-init.sh | sh -s -- -y --profile minimal --no-modify-path
RUN cargo install cargo-pgrx --version 0.17.0 --locked
RUN cargo pgrx init --pg$PG_MAJOR /usr/lib/postgresql/$PG_MAJOR/bin/pg_config
WORKDIR /lockstep
COPY . .
RUN cargo pgrx package --pg-config /usr/lib/postgresql/$PG_MAJOR/bin/pg_config --out-dir /package

FROM postgres:${PG_MAJOR}-bookworm
COPY --from=build /package/ /
