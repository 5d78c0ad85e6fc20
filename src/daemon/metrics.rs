//! What `GET /metrics` tells, in the Prometheus text format: names, units and labels as its conventions want
//! them, all with the prefix `tunneld_`.

use std::fs;
use std::sync::Mutex;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};
use rustix::process::{Resource, getrlimit};

use super::admission::Census;
use crate::lock::lock;
use crate::tunnel::End;

/// The media type of the text.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Every status a refusal can have, so that each is there from the start, as 0.
const REFUSALS: [u16; 10] = [400, 401, 403, 404, 405, 408, 426, 431, 502, 503];

/// In seconds, as dials end: on loopback, across a network, in the dial timeout.
const DIAL_BUCKETS: [f64; 10] = [0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// In seconds, from a command to days.
const TUNNEL_BUCKETS: [f64; 10] = [
    0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0,
];

/// The daemon's counters.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    opened: IntCounter,
    closed: IntCounterVec,
    duration: Histogram,
    dial: HistogramVec,
    refusals: IntCounterVec,
    snapshot: Mutex<Snapshot>,
}

/// What is looked up when it is asked for.
#[derive(Debug)]
struct Snapshot {
    tunnels: IntGauge,
    bytes: IntCounterVec,
    connections: IntGauge,
    limit: IntGauge,
    threads: IntGauge,
    descriptors: IntGauge,
    descriptor_limit: IntGauge,
}

impl Metrics {
    /// All counters at 0.
    ///
    /// # Errors
    /// When a metric's name or label breaks the conventions, which is a mistake in this file.
    pub fn new() -> prometheus::Result<Metrics> {
        let registry = Registry::new();
        let metrics = Metrics {
            opened: counter(&registry, "tunneld_tunnels_opened_total", "Tunnels opened.")?,
            closed: counters(
                &registry,
                "tunneld_tunnels_closed_total",
                "Tunnels closed, by reason.",
                "end",
            )?,
            duration: registered(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "tunneld_tunnel_duration_seconds",
                        "From a tunnel's 101 to the end of both directions.",
                    )
                    .buckets(TUNNEL_BUCKETS.to_vec()),
                )?,
            )?,
            dial: registered(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "tunneld_dial_duration_seconds",
                        "From a valid request to a connected target, or to the failure, resolving included.",
                    )
                    .buckets(DIAL_BUCKETS.to_vec()),
                    &["result"],
                )?,
            )?,
            refusals: counters(
                &registry,
                "tunneld_refusals_total",
                "Requests answered with an error, by status.",
                "status",
            )?,
            snapshot: Mutex::new(Snapshot::new(&registry)?),
            registry,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// A series that appears with its first event can't show that event as an increase.
    fn begin_at_zero(&self) {
        for end in End::ALL {
            self.closed.with_label_values(&[end.label()]);
        }
        for status in REFUSALS {
            self.refusals.with_label_values(&[&status.to_string()]);
        }
        for result in ["connected", "failed"] {
            self.dial.with_label_values(&[result]);
        }
    }

    /// A tunnel was opened.
    pub fn note_opened(&self) {
        self.opened.inc();
    }

    /// A tunnel that had been open for `duration` ended.
    pub fn note_closed(&self, end: End, duration: Duration) {
        self.closed.with_label_values(&[end.label()]).inc();
        self.duration.observe(duration.as_secs_f64());
    }

    /// A dial took `duration`.
    pub fn note_dial(&self, connected: bool, duration: Duration) {
        let result = if connected { "connected" } else { "failed" };
        self.dial
            .with_label_values(&[result])
            .observe(duration.as_secs_f64());
    }

    /// A request was refused.
    pub fn note_refusal(&self, status: u16) {
        self.refusals
            .with_label_values(&[&status.to_string()])
            .inc();
    }

    /// Everything as text, together with what `census` counted just now.
    pub fn text(&self, census: &Census) -> String {
        lock(&self.snapshot).take(census);
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_default()
    }
}

impl Snapshot {
    fn new(registry: &Registry) -> prometheus::Result<Snapshot> {
        let gauge = |name, help| registered(registry, IntGauge::new(name, help)?);
        Ok(Snapshot {
            tunnels: gauge("tunneld_tunnels_open", "Tunnels open now.")?,
            bytes: counters(
                registry,
                "tunneld_bytes_total",
                "Payload bytes relayed, to the target (up) and to the client (down).",
                "direction",
            )?,
            connections: gauge(
                "tunneld_connections",
                "Client connections open now, tunnels among them.",
            )?,
            limit: gauge(
                "tunneld_connections_limit",
                "Client connections that may be open at once.",
            )?,
            threads: gauge("tunneld_threads", "Threads of the daemon.")?,
            descriptors: gauge("tunneld_open_fds", "Open file descriptors.")?,
            descriptor_limit: gauge("tunneld_max_fds", "File descriptors that may be open.")?,
        })
    }

    fn take(&self, census: &Census) {
        self.tunnels.set(signed(census.tunnels));
        self.connections.set(signed(census.connections));
        self.limit.set(signed(census.limit));
        raise(&self.bytes, "up", census.up);
        raise(&self.bytes, "down", census.down);
        self.threads.set(entries("/proc/self/task"));
        self.descriptors.set(entries("/proc/self/fd"));
        let limit = getrlimit(Resource::Nofile).current;
        self.descriptor_limit
            .set(limit.and_then(|limit| limit.try_into().ok()).unwrap_or(0));
    }
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    registered(registry, IntCounter::new(name, help)?)
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
) -> prometheus::Result<IntCounterVec> {
    registered(
        registry,
        IntCounterVec::new(Opts::new(name, help), &[label])?,
    )
}

fn registered<T: Collector + Clone + 'static>(
    registry: &Registry,
    metric: T,
) -> prometheus::Result<T> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// Brings a counter to `total`, unless a later count has come first.
fn raise(counters: &IntCounterVec, direction: &str, total: u64) {
    let counter = counters.with_label_values(&[direction]);
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// How many entries a directory of /proc has; 0 where there is none.
fn entries(directory: &str) -> i64 {
    fs::read_dir(directory).map_or(0, |entries| signed(entries.count()))
}
