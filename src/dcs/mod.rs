//! The store: etcd, and an in-memory one that behaves like it. Both speak the wire format of [`schema`].

pub mod etcd;
pub mod memory;
pub mod schema;
