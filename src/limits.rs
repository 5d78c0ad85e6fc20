//! How much of the system a process may use: descriptors and threads, and how many connections they are enough for.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use rustix::process::{Resource, getrlimit, getuid};

/// The most descriptors and threads that a connection holds at once.
#[derive(Debug, Clone, Copy)]
struct Needs {
    descriptors: u64,
    threads: usize,
}

/// A connection to the daemon: its own descriptor and those of up to six attempts to connect. A tunnel needs fewer: two
/// sockets, a pipe, and two that wake its threads.
const OF_DAEMON: Needs = Needs {
    descriptors: 7,
    threads: TUNNEL_THREADS,
};

/// A connection to a local port of the client: two sockets and two that wake its threads. Attempts to connect hold more,
/// but for a moment, and pipes are made only where there are descriptors for them.
const OF_CLIENT: Needs = Needs {
    descriptors: 4,
    threads: TUNNEL_THREADS,
};

/// The same under TLS, which has a pair of sockets and a thread between the two.
const OF_CLIENT_WITH_TLS: Needs = Needs {
    descriptors: 6,
    threads: TUNNEL_THREADS + 1,
};

/// Descriptors for what is neither a connection nor listens: the standard streams, what wakes threads, what signals
/// come through, and the connection to tiny_http, or a client's attempts to connect.
const DESCRIPTORS_ELSE: u64 = 17;

/// A tunnel's threads. Any other connection has one.
const TUNNEL_THREADS: usize = 3;

/// Threads for what is no connection: the gate, two for signals, the log, tiny_http's five, the lingering close, sums for
/// the log.
const THREADS_ELSE: u64 = 11;

/// The pools whose idle threads stay for a while: connections, and the three of tunnels.
const POOLS: u64 = 4;

/// The most connections on their way out, without a slot: those evicted, as many that are being closed, and half as many
/// ended tunnels whose last bytes are on their way.
const MAX_LEAVING: u64 = 128;

/// How many connections there may be, and how many more on their way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// With a slot.
    pub connections: usize,
    /// Evicted or being closed.
    pub leaving: usize,
}

impl Limits {
    /// Lowers `wanted` connections to the daemon, with a warning, to what descriptors and threads allow, beside so many
    /// `listeners`: tiny_http must never run out of them.
    ///
    /// # Errors
    /// When there are too few descriptors for a single connection.
    pub fn of_daemon(wanted: usize, listeners: usize) -> io::Result<Limits> {
        let leaving = (descriptors().min(threads()) / 16).clamp(2, MAX_LEAVING);
        Ok(Limits {
            connections: allowed(wanted, listeners, leaving, OF_DAEMON)?,
            leaving: leaving as usize,
        })
    }
}

/// Lowers `wanted` connections to the client's local ports, with a warning, to what descriptors and threads allow, beside
/// so many `listeners`.
///
/// # Errors
/// When there are too few descriptors for a single connection.
pub fn of_client(wanted: usize, listeners: usize, is_tls: bool) -> io::Result<usize> {
    let each = if is_tls {
        OF_CLIENT_WITH_TLS
    } else {
        OF_CLIENT
    };
    allowed(wanted, listeners, 0, each)
}

fn allowed(wanted: usize, listeners: usize, leaving: u64, each: Needs) -> io::Result<usize> {
    let (descriptors, threads) = (descriptors(), threads());
    let resolvers = resolvers_of(threads, descriptors);
    let of_connections = descriptors.saturating_sub(listeners as u64);
    let by_descriptors = enough_descriptors_for(of_connections, leaving, resolvers, each);
    if by_descriptors == 0 {
        return Err(io::Error::other(format!(
            "{descriptors} descriptors are too few: raise RLIMIT_NOFILE (ulimit -n)"
        )));
    }
    let by_threads = enough_threads_for(threads, leaving, resolvers, each);
    if by_descriptors.min(by_threads) < wanted {
        if by_descriptors <= by_threads {
            log::warn!(
                "{descriptors} descriptors allow {by_descriptors} connections instead of {wanted}: raise RLIMIT_NOFILE (ulimit -n) for more"
            );
        } else {
            log::warn!(
                "{threads} threads allow {by_threads} connections instead of {wanted}: raise RLIMIT_NPROC (ulimit -u) or the cgroup's pids.max for more"
            );
        }
    }
    Ok(wanted.min(by_descriptors).min(by_threads))
}

/// A look-up holds one, and may outlive its connection.
fn enough_descriptors_for(descriptors: u64, leaving: u64, resolvers: usize, each: Needs) -> usize {
    let aside = DESCRIPTORS_ELSE + leaving * 5 / 2 + resolvers as u64;
    saturated(descriptors.saturating_sub(aside) / each.descriptors)
}

/// At least one: a limit of threads is shared with other processes, so nobody can know that none is left.
fn enough_threads_for(threads: u64, leaving: u64, resolvers: usize, each: Needs) -> usize {
    let idle = POOLS * share(threads, 32, 32) as u64;
    let aside = THREADS_ELSE + leaving + idle + resolvers as u64;
    (saturated(threads.saturating_sub(aside)) / each.threads).max(1)
}

/// The most threads of a pool that may be idle.
pub fn idle_threads() -> usize {
    share(threads(), 32, 32)
}

/// The most threads that may be resolving names.
pub fn resolver_threads() -> usize {
    resolvers_of(threads(), descriptors())
}

fn resolvers_of(threads: u64, descriptors: u64) -> usize {
    let by_descriptors = share(descriptors, 16, 128);
    share(threads, 8, 128).min(by_descriptors).max(1)
}

/// One of `parts` of `threads`, but `most` at most.
fn share(threads: u64, parts: u64, most: usize) -> usize {
    saturated(threads / parts).min(most)
}

fn saturated(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

fn descriptors() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many threads this process may have, all that it has and its cgroup and its user have among them; as it was
/// at the first call.
fn threads() -> u64 {
    static THREADS: OnceLock<u64> = OnceLock::new();
    *THREADS.get_or_init(|| {
        let root = Path::new("/sys/fs/cgroup");
        let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let of_cgroup = pids_max(root, &cgroup).unwrap_or(u64::MAX);
        match getrlimit(Resource::Nproc).current {
            Some(of_user) if nproc_binds() => of_user.min(of_cgroup),
            _ => of_cgroup,
        }
    })
}

/// Whether RLIMIT_NPROC is enforced (getrlimit(2)): not for the system's root, nor with `CAP_SYS_ADMIN` or
/// `CAP_SYS_RESOURCE`. A user namespace's root and capabilities are not the system's.
fn nproc_binds() -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    let is_initial_namespace = read("uid_map")
        .split_whitespace()
        .eq(["0", "0", "4294967295"]);
    !(is_initial_namespace && (getuid().is_root() || may_exceed_nproc(&read("status"))))
}

fn may_exceed_nproc(status: &str) -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|value| u64::from_str_radix(value.trim(), 16).ok());
    effective.is_some_and(|set| set & (CAP_SYS_ADMIN | CAP_SYS_RESOURCE) != 0)
}

/// The lowest `pids.max` of the cgroup in `/proc/self/cgroup` and of those above it, as each limits what is in it
/// (version 2, and version 1 of the pids controller). In a container, whose paths may be those of the system outside
/// of it, the ones that exist are its own.
fn pids_max(root: &Path, cgroup: &str) -> Option<u64> {
    let directories = cgroup.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let version_1 = controllers.split(',').any(|name| name == "pids");
        let mount = match (controllers, version_1) {
            ("", _) => root.to_owned(),
            (_, true) => root.join("pids"),
            _ => return None,
        };
        Some((mount, PathBuf::from(path)))
    });
    let limits = directories.flat_map(|(mount, path)| {
        let inner: PathBuf = path
            .components()
            .filter(|part| matches!(part, Component::Normal(_)))
            .collect();
        let limits: Vec<u64> = inner
            .ancestors()
            .filter_map(|cgroup| fs::read_to_string(mount.join(cgroup).join("pids.max")).ok())
            .filter_map(|limit| limit.trim().parse().ok())
            .collect();
        limits
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_pids_max_up_to_the_root_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let limit = |cgroup: &str| pids_max(root.path(), cgroup);
        assert_eq!(limit("0::/a/b\n"), None);
        write("a/b/pids.max", "max\n");
        assert_eq!(limit("0::/a/b\n"), None);
        write("a/pids.max", "300\n");
        assert_eq!(limit("0::/a/b\n"), Some(300));
        assert_eq!(limit("0::/../../a/b\n"), Some(300));
        write("pids.max", "200\n");
        assert_eq!(limit("0::/a/b\n"), Some(200));
        assert_eq!(limit("0::/not/there\n"), Some(200));
        write("a/b/pids.max", "100\n");
        assert_eq!(limit("0::/a/b\n"), Some(100));
        assert_eq!(limit("12:cpu,cpuacct:/a/b\n"), None);
        write("pids/docker/pids.max", "50\n");
        assert_eq!(limit("8:misc,pids:/docker/1\n0::/a\n"), Some(50));
        assert_eq!(limit(""), None);
    }

    #[test]
    fn only_two_capabilities_lift_the_limit_of_processes() {
        let with = |set: &str| may_exceed_nproc(&format!("CapPrm:\t0\nCapEff:\t{set}\n"));
        assert!(with("000001ffffffffff") && with("0000000001000000") && with("0000000000200000"));
        assert!(!with("0000000000000000") && !with("00000000a80425fb") && !may_exceed_nproc(""));
    }

    #[test]
    fn a_client_needs_fewer_descriptors_than_a_daemon_and_more_under_tls() {
        let of = |each| enough_descriptors_for(1024, 0, 64, each);
        assert_eq!(of(OF_CLIENT), 235);
        assert!(of(OF_DAEMON) < of(OF_CLIENT_WITH_TLS) && of(OF_CLIENT_WITH_TLS) < of(OF_CLIENT));
    }

    #[test]
    fn threads_are_kept_for_what_is_no_connection() {
        assert!(enough_threads_for(u64::MAX, 128, 128, OF_DAEMON) > 1_000_000);
        for threads in [64, 300, 1000, 10_000] {
            let leaving = (threads / 16).clamp(2, MAX_LEAVING);
            let resolvers = resolvers_of(threads, u64::MAX);
            let connections = enough_threads_for(threads, leaving, resolvers, OF_DAEMON) as u64;
            let held = TUNNEL_THREADS as u64 * connections + resolvers as u64 + leaving;
            assert!(held + THREADS_ELSE <= threads, "{connections} of {threads}");
            assert!(connections >= threads / 8, "{connections} of {threads}");
        }
        assert_eq!(enough_threads_for(4, 2, 1, OF_DAEMON), 1);
    }

    #[test]
    fn look_ups_leave_descriptors_to_connections() {
        for (descriptors, resolvers, connections) in
            [(32, 2, 1), (128, 8, 11), (1024, 64, 111), (4096, 128, 518)]
        {
            assert_eq!(resolvers_of(u64::MAX, descriptors), resolvers);
            let leaving = (descriptors / 16).clamp(2, MAX_LEAVING);
            let enough = enough_descriptors_for(descriptors, leaving, resolvers, OF_DAEMON);
            assert_eq!(enough, connections, "of {descriptors}");
        }
        assert_eq!(resolvers_of(64, 1024), 8);
        assert_eq!(resolvers_of(1, 1), 1);
    }
}
