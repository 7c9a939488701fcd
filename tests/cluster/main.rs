//! Real PostgreSQL, real etcd, real processes killed.
