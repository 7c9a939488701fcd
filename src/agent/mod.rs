//! The loop that observes, decides and executes, and what it needs around it: the state file, the lease keeper, the jobs.
//! Read `run.rs` first.

pub mod answers;
pub mod execute;
pub mod jobs;
pub mod lease_keeper;
pub mod peer_watch;
pub mod priority;
mod promise_asker;
pub mod run;
pub mod state_file;
pub mod status;
