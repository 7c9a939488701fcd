//! What talks to clients: accepts them, finds out what they want and where it is, and lets them in.

pub mod door;
pub mod exchange;
pub mod listen;
pub mod opener;
pub mod routes;
