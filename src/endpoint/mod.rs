//! What clients see of the cluster: one address.

pub mod auth;
pub mod consumers;
pub mod ledger;
pub mod tls;
