//! What tests share: real programs in temporary directories, and waiting for a state instead of for a time.

// Each test binary uses another part of it.
#![allow(dead_code, reason = "not every theme uses every helper")]

pub mod etcd;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Says on the terminal, past the test harness that swallows output of tests that pass, that something was not tested.
/// `PGVIGIL_TEST_SKIP=never` makes it a failure, for machines that are meant to have everything.
pub fn skipped(why: &str) {
    assert!(std::env::var_os("PGVIGIL_TEST_SKIP").is_none_or(|v| v != "never"), "must not be skipped here: {why}");
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {why}");
}

/// The program if it is installed.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Asks until the answer is yes; fails the test with `what` after `within`. For states that send no event of their own.
pub async fn wait_until(what: &str, within: Duration, mut reached: impl AsyncFnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !reached().await {
        assert!(begun.elapsed() < within, "not within {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}
