//! The only way into PostgreSQL: whether it is open, how one goes in, and what an answer has to wait for.

pub mod backend;
pub mod barrier;
pub mod cancel;
pub mod opening;
