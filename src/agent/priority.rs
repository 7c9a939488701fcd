//! A place in front for the threads that keep the lease and decide: a busy host must not cost a healthy primary its lease.

/// Below interactive work, far from real time: these threads sleep nearly always.
const NICE: i32 = -10;

/// For the calling thread only (Linux counts niceness by thread). Refused without the right to it, which is no error.
pub fn raise() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "threads stay at normal priority");
    }
}
