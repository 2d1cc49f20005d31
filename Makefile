# Everything a person or CI runs. `make demo` needs Rust and a C compiler, nothing else; `make test` installs what it
# can when it runs as root, and says what it skips.

CARGO ?= cargo
SEEDS ?= 10000
# The first of them.
FROM ?= 0
# The seeds of `make test`: two thousand that follow from what the commit has, so that each tries others. Without git, the first ones.
COMMIT = $(shell git rev-parse "HEAD^{tree}" 2>/dev/null | cut -c1-7)
COMMIT_FROM = $(if $(COMMIT),$(shell echo $$((0x$(COMMIT) * 2000))),0)
# How long `make chaos` goes on, and what it tries; another seed each time if none is given.
MINUTES ?= 3
SEED ?=
# Each fuzz target runs for so long.
SECONDS ?= 30
# Each has its fuzz targets in a package of its own, `fuzz`, which the commands over the workspace do not build.
FUZZED = dataplane transfer switchctl placement
# Packages of DPDK workers are empty without feature `dpdk`, so commands over the workspace need no DPDK.
DPDK_PACKAGES = libdpdk-dev dpdk-dev pkg-config clang libclang-dev
LAB_PACKAGES = openvswitch-switch iproute2 procps ethtool iperf3 nginx-light curl openssh-server openssh-client \
  iputils-ping $(DPDK_PACKAGES)
HAS_DPDK = (pkg-config --exists libdpdk && command -v clang) >/dev/null 2>&1

.PHONY: demo lab lab-short lab-setup build test test-setup lint bench sim chaos fuzz fuzz-lint clean

# With DEMO_RUNS=n it is played n times, with n seeds, and each run prints a line.
DEMO_RUNS ?= 1
LAB_RUNS ?= 1

# $(call runs,NAME,COUNT,COMMAND): once, or COUNT times with a line for each; `$$run` is its number. What a run printed is kept.
define runs
@set -e; if [ "$(2)" = 1 ]; then run=0; exec $(3); fi; kept="$${CARGO_TARGET_DIR:-target}/$(1)"; mkdir -p "$$kept"; failed=0; \
for run in $$(seq 1 $(2)); do said="$$kept/run-$$run.txt"; start=$$(date +%s); \
  if $(3) >"$$said" 2>&1; then end="well"; \
  else failed=$$((failed + 1)); end="FAILED: $$(sed -n '/^Not all was well/,/^Logs/p;/could not be/p' "$$said" | tr '\n' ' '), see $$said"; fi; \
  echo "$(1), run $$run of $(2): $$end ($$(($$(date +%s) - start)) s)"; \
done; echo "$(1): $$(($(2) - failed)) of $(2) runs were well"; [ $$failed = 0 ]
endef

demo: build
	$(call runs,demo,$(DEMO_RUNS),"$${CARGO_TARGET_DIR:-target}/release/limosa" demo $(if $(filter-out 1,$(DEMO_RUNS)),--seed $$run,) $(DEMO))

# Three sites in network namespaces, with Open vSwitch, DPDK workers and the kernel's TCP: docs/lab.md. Needs root. LAB_RUNS=n as
# DEMO_RUNS.
lab: lab-setup
	$(CARGO) build --release --package limosa --features dpdk
	$(call runs,lab,$(LAB_RUNS),"$${CARGO_TARGET_DIR:-target}/release/limosa" lab $(LAB))

# Two sites, one move, one kill. What it cannot run it says, and is content.
lab-short: lab-setup
	@if ! $(HAS_DPDK); then echo "SKIPPED: the short lab (DPDK is not installed)"; else \
	  $(CARGO) build --package limosa --features dpdk || exit 1; \
	  limosa="$${CARGO_TARGET_DIR:-target}/debug/limosa"; \
	  if missing=$$($$limosa lab --check); then $$limosa lab --short; \
	  else echo "SKIPPED: the short lab ($$missing)"; fi; fi

# RUNLEVEL=1 keeps the packages' own services from starting: the lab starts its own, in its namespaces.
lab-setup:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 \
	    && ! dpkg-query --show $(LAB_PACKAGES) >/dev/null 2>&1; then \
	  (apt-get update -q && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
	    apt-get install -y -q --no-install-recommends $(LAB_PACKAGES)) >/dev/null 2>&1 || true; fi

build:
	$(CARGO) build --release --package limosa

# Whole deployments (`--test process`) run one at a time: each is some 20 processes, and two would fight for the cores. They come
# last, so that what is printed ends with the line that counts tests.
test: test-setup
	$(CARGO) test --workspace --exclude limosa
	@if $(HAS_DPDK) && [ "$$(id -u)" = 0 ]; then set -x; \
	  $(CARGO) test --package limosa-dpdk --package limosa-dataplane --package limosa --features dpdk \
	    --test devices --test refusals --test huge_pages --test dpdk; \
	else echo "SKIPPED: tests of DPDK workers (DPDK is not installed, or not root)"; fi
	@$(MAKE) --no-print-directory lab-short
	SIM_FROM=$(COMMIT_FROM) $(CARGO) test --package limosa --lib --bins --test api --test certs --test listeners --test sim
	$(CARGO) test --package limosa --test second_start --test life --test stalls -- --test-threads=1
	CHAOS_SEED=$${CHAOS_SEED:-5} $(CARGO) test --package limosa --test chaos -- --nocapture
	$(CARGO) test --package limosa --test process -- --test-threads=1

test-setup:
	@if command -v ovs-ofctl >/dev/null 2>&1; then echo "ovs-ofctl is there: its tests run"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  (apt-get update -q && apt-get install -y -q --no-install-recommends openvswitch-switch) >/dev/null 2>&1 \
	    && echo "Open vSwitch was installed: its tests run" \
	    || echo "SKIPPED: tests against Open vSwitch (it could not be installed)"; \
	else echo "SKIPPED: tests against Open vSwitch (not installed, and not root to install it)"; fi
	@if ! $(HAS_DPDK) && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  (apt-get update -q && apt-get install -y -q --no-install-recommends $(DPDK_PACKAGES)) >/dev/null 2>&1 || true; fi

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@if $(HAS_DPDK); then set -x; \
	  $(CARGO) clippy --workspace --all-targets --features limosa-dpdk/dpdk,limosa/dpdk -- -D warnings; \
	else echo "SKIPPED: lints of DPDK workers (DPDK is not installed)"; fi

sim:
	SIM_SEEDS=$(SEEDS) SIM_FROM=$(FROM) $(CARGO) test --release --package limosa --test sim -- --nocapture

# Storms of faults over a deployment under traffic, and a verdict on each promise: CONTRIBUTING.md. With LIMOSA_TEST_DIRECTORY=DIR
# the logs of all processes, and what was done to them when, stay there.
chaos:
	CHAOS_MINUTES=$(MINUTES) CHAOS_SEED=$(SEED) $(CARGO) test --package limosa --test chaos -- --nocapture

# All fuzz targets in turn. Needs cargo-fuzz (`cargo install cargo-fuzz`) and a C++ compiler. The sanitizer is not stable yet, hence
# RUSTC_BOOTSTRAP. What is found lies in PACKAGE/fuzz/artifacts; inputs that reach something new in target/fuzz/corpus: CONTRIBUTING.md.
fuzz:
	@command -v cargo-fuzz >/dev/null || { echo "make fuzz needs cargo-fuzz: cargo install cargo-fuzz"; exit 1; }
	@set -e; export RUSTC_BOOTSTRAP=1; target="$${CARGO_TARGET_DIR:-$(CURDIR)/target}/fuzz"; \
	for package in $(FUZZED); do for fuzz in $$(cd $$package && $(CARGO) fuzz list); do \
	  echo "$$package: $$fuzz, $(SECONDS) s"; new="$$target/corpus/$$package/$$fuzz"; mkdir -p "$$new"; \
	  (cd $$package && $(CARGO) fuzz run --target-dir "$$target" $$fuzz "$$new" fuzz/corpus/$$fuzz -- \
	    -max_total_time=$(SECONDS) -max_len=2048 -timeout=10 -print_final_stats=1); \
	done; done

# That the fuzz targets compile, which `make lint` leaves out: their dependencies are built anew.
fuzz-lint:
	@set -e; for package in $(FUZZED); do set -x; \
	  $(CARGO) clippy --locked --manifest-path $$package/fuzz/Cargo.toml --target-dir "$${CARGO_TARGET_DIR:-target}/fuzz-lint" \
	    -- -D warnings; { set +x; } 2>/dev/null; done

bench:
	$(CARGO) bench --workspace --benches
	$(CARGO) run --release --package limosa --features exact -- bench placement
	@if $(HAS_DPDK) && [ "$$(id -u)" = 0 ]; then set -x; \
	  $(CARGO) bench --package limosa-dataplane --features dpdk --bench dpdk \
	  && $(CARGO) bench --package limosa --features dpdk --bench dpdk_idle; \
	else echo "SKIPPED: benches of DPDK workers (DPDK is not installed, or not root)"; fi

clean:
	$(CARGO) clean
