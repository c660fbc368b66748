# The verbs; what they do is in tools/. PG_CONFIG=/path/to/pg_config names a server of yours in place of the embedded one.
export PG_CONFIG
MINUTES ?= 120

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-upgraded test-dockerfile test-package check install package matrix release bench bench-quick stop clean

help: ## List these verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile
	@echo "PG_CONFIG=/path/to/pg_config chooses a server; without it they use an embedded PostgreSQL 18."

setup: ## Install what is missing (the other verbs do so too)
	@tools/setup

demo: setup ## Run the demonstration and leave its server up
	@tools/demo

test: setup ## Run the tests
	@tools/test

test-all: setup ## Run the tests, those that take minutes too
	@tools/test --all

test-upgraded: setup ## Run the tests on an older version that was upgraded
	@tools/test --upgraded 0.0.0

check: setup ## Check the formatting and lint
	@tools/check

install: setup ## Install the extension into the server of PG_CONFIG
	@tools/install $(PG_CONFIG)

package: setup ## Make a Debian package for each PostgreSQL that is installed
	@tools/package

test-dockerfile: ## Run the steps of the Dockerfile in a fresh Debian (as root)
	@tools/test-dockerfile

test-package: package ## Use the package for PostgreSQL 15 in a fresh Debian (as root)
	@tools/test-package

matrix: ## Run every test on each supported PostgreSQL version
	@tools/matrix

release: setup ## Keep the SQL of the current version, as part of releasing it
	@tools/release freeze

bench: setup ## Measure lockstep and its peers side by side (MINUTES=120 is the time that it may take)
	@tools/bench --minutes $(MINUTES)

bench-quick: setup ## The same for a few cells, in 3 minutes
	@tools/bench --quick

stop: ## Stop and delete the demonstration's server
	@tools/server remove

clean: ## Stop servers and delete everything that was built or downloaded here
	@tools/clean
