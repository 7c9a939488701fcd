//! One binary for everything that needs no cluster: contracts, edges, golden files, layers.

mod guardian;
mod guardian_postgresql;
