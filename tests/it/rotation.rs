//! The token file is followed: a roll-over under load, and files that are no good.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tempfile::TempDir;

use crate::support::*;

struct File {
    path: PathBuf,
    _directory: TempDir,
}

impl File {
    fn with(text: &str) -> File {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let file = File {
            path,
            _directory: directory,
        };
        file.replace(text);
        file
    }

    /// As a careful operator does it: a new file takes the name of the old one.
    fn replace(&self, text: &str) {
        let new = self.path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &self.path).unwrap();
    }

    fn command(&self) -> Command {
        Daemon::command(&["--access-token-file", self.path.to_str().unwrap()])
    }
}

fn status(daemon: &Daemon, token: &str) -> u16 {
    daemon
        .get("/openapi.yaml", &[&format!("X-Access-Token: {token}")])
        .status
}

fn open(daemon: &Daemon, target: &Target, token: &str) -> Client {
    let url = format!("/tunnel?port={}", target.port);
    Client::open_with(daemon, &url, &[&format!("X-Access-Token: {token}")])
}

#[test]
fn a_token_is_rolled_over_under_load_and_tunnels_stay() {
    let file = File::with("old\n");
    let daemon = Daemon::spawn(file.command());
    let target = Target::echo();
    let mut tunnel = open(&daemon, &target, "old");
    let (is_over, daemon) = (AtomicBool::new(false), &daemon);
    thread::scope(|scope| {
        let load: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::SeqCst) {
                        assert_eq!(status(daemon, "stays"), 401);
                        assert_eq!(daemon.get("/health", &[]).status, 204);
                    }
                })
            })
            .collect();
        for round in 0..50 {
            let (old, new) = (format!("t{round}"), format!("t{}", round + 1));
            file.replace(&format!("{old}\n{new}\n"));
            assert_eq!((status(daemon, &old), status(daemon, &new)), (200, 200));
            file.replace(&format!("{new}\n"));
            assert_eq!((status(daemon, &old), status(daemon, &new)), (401, 200));
        }
        is_over.store(true, Ordering::SeqCst);
        load.into_iter().for_each(|thread| thread.join().unwrap());
    });
    tunnel.send(b"x");
    assert_eq!(tunnel.see(), Seen::Binary(b"x".to_vec()));
    assert_eq!(status(daemon, "old"), 401);
    daemon.logged(1, &["INFO", "access tokens read again", "Tokens(2 hidden)"]);
    assert!(!daemon.log().contains("t49"));
}

#[test]
fn a_file_written_in_place_is_followed_however_fast() {
    let file = File::with("a0");
    let daemon = Daemon::spawn(file.command());
    // Of one length, within one tick of the clock.
    for round in 1..10 {
        fs::write(&file.path, format!("a{round}")).unwrap();
        assert_eq!(status(&daemon, &format!("a{round}")), 200);
        assert_eq!(status(&daemon, &format!("a{}", round - 1)), 401);
    }
}

/// Replaces the file by what `spoil` makes of it: the last good token stays, and an error is logged once.
fn keeps_the_last_good(spoil: impl FnOnce(&Path), expected: &str) {
    let file = File::with("good");
    let daemon = Daemon::spawn(file.command());
    assert_eq!(status(&daemon, "good"), 200);
    spoil(&file.path);
    for _ in 0..3 {
        assert_eq!(
            (status(&daemon, "good"), status(&daemon, "bad")),
            (200, 401)
        );
    }
    let line = daemon.logged(1, &["ERROR", "last good tokens stay valid"]);
    assert!(line.contains(expected) && line.contains("token"), "{line}");
    assert_eq!(daemon.log().matches("ERROR").count(), 1, "{}", daemon.log());
    if file.path.is_dir() {
        fs::remove_dir(&file.path).unwrap();
    }
    file.replace("better");
    assert_eq!(
        (status(&daemon, "good"), status(&daemon, "better")),
        (401, 200)
    );
}

#[test]
fn an_empty_file_keeps_the_last_good_token() {
    keeps_the_last_good(|path| fs::write(path, " \n\n").unwrap(), "is empty");
}

#[test]
fn a_file_with_a_token_that_cannot_be_sent_keeps_the_last_good_one() {
    keeps_the_last_good(
        |path| fs::write(path, "bad\ntwo words").unwrap(),
        "visible ASCII",
    );
}

#[test]
fn a_missing_file_keeps_the_last_good_token() {
    keeps_the_last_good(|path| fs::remove_file(path).unwrap(), "No such file");
}

#[test]
fn a_directory_or_a_pipe_in_its_place_keeps_the_last_good_token() {
    let directory = |path: &Path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    };
    keeps_the_last_good(directory, "no longer a regular file");
    let pipe = |path: &Path| {
        fs::remove_file(path).unwrap();
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    };
    keeps_the_last_good(pipe, "no longer a regular file");
}

#[test]
fn a_file_that_others_can_read_or_change_is_warned_of() {
    let mode = |mode: u32| <fs::Permissions as PermissionsExt>::from_mode(mode);
    let file = File::with("good");
    for (bits, warned) in [
        (0o600, [false, false]),
        (0o440, [false, false]),
        (0o604, [true, false]),
        (0o620, [false, true]),
        (0o602, [false, true]),
        (0o666, [true, true]),
    ] {
        fs::set_permissions(&file.path, mode(bits)).unwrap();
        let log = Daemon::spawn(file.command()).log();
        let warnings = ["chmod o-r", "chmod go-w"].map(|cure| {
            log.lines()
                .any(|line| line.contains("WARN") && line.contains(cure))
        });
        assert_eq!(warnings, warned, "{bits:o}: {log}");
    }
    fs::set_permissions(&file.path, mode(0o600)).unwrap();
    let daemon = Daemon::spawn(file.command());
    fs::set_permissions(&file.path, mode(0o620)).unwrap();
    assert_eq!(status(&daemon, "good"), 200);
    daemon.logged(1, &["WARN", "chmod go-w"]);
}

#[test]
fn a_pipe_is_read_once() {
    let mut command = Command::new("bash");
    let inner = Daemon::command(&["--listen", "127.0.0.1:0"]);
    let program = inner.get_program().to_str().unwrap();
    let script = format!("exec {program} --listen 127.0.0.1:0 --access-token-file <(echo piped)");
    command
        .args(["-c", &script])
        .env_remove("TUNNELD_ACCESS_TOKEN");
    let daemon = Daemon::spawn(command);
    for _ in 0..3 {
        assert_eq!((status(&daemon, "piped"), status(&daemon, "x")), (200, 401));
    }
}

#[test]
fn a_huge_file_keeps_the_last_good_token() {
    let spoil = |path: &Path| fs::write(path, "bad\n".repeat(1 << 19)).unwrap();
    keeps_the_last_good(spoil, "longer than");
}
