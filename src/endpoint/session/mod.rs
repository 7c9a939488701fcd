//! A session after its greeting: bytes both ways, and what has to be known about them.

pub mod relay;
pub mod tracker;
