//! PostgreSQL's wire protocol as far as a proxy has to understand it: headers, first packets, a few bodies. No I/O in here.

pub mod frame;
pub mod key;
pub mod message;
pub mod proxy;
pub mod startup;
