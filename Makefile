# Everything a person or CI runs. `make demo` needs Rust and a C compiler, nothing else; `make test` installs what it
# can when it runs as root, and says what it skips.

CARGO ?= cargo
SEEDS ?= 10000

.PHONY: demo build test test-setup lint bench sim clean

demo: build
	"$${CARGO_TARGET_DIR:-target}/release/limosa" demo $(DEMO)

build:
	$(CARGO) build --release --package limosa

# Whole deployments (the last line) run one at a time: each is some 20 processes, and two would fight for the cores.
test: test-setup
	$(CARGO) test --workspace --exclude limosa
	$(CARGO) test --package limosa --lib --bins --test api --test sim
	$(CARGO) test --package limosa --test process -- --test-threads=1

test-setup:
	@if command -v ovs-ofctl >/dev/null 2>&1; then echo "ovs-ofctl is there: its tests run"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  (apt-get update -q && apt-get install -y -q --no-install-recommends openvswitch-switch) >/dev/null 2>&1 \
	    && echo "Open vSwitch was installed: its tests run" \
	    || echo "SKIPPED: tests against Open vSwitch (it could not be installed)"; \
	else echo "SKIPPED: tests against Open vSwitch (not installed, and not root to install it)"; fi

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

sim:
	SIM_SEEDS=$(SEEDS) $(CARGO) test --release --package limosa --test sim -- --nocapture

bench:
	$(CARGO) bench --workspace --benches

clean:
	$(CARGO) clean
