//! The store in etcd.
//!
//! Owns the connections (`members.rs`: one client per etcd member, sticky failover), what etcd's errors mean (`failure.rs`),
//! and, for a handle made by [`EtcdDcs::connect`], two tasks that end with it: one keeps every connection warm, so that
//! nobody dials on the election path, one watches the prefix (`watch.rs`). A handle made by `separate()` has no tasks.
//!
//! What it must never do: answer from a cache, or send a write a second time when the first one may have been applied. A
//! transaction guarded by revisions would then be in conflict with itself.

mod check;
mod failure;
mod members;
mod watch;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinSet;
use tokio::time::Instant;

pub use check::{MemberCheck, MemberStatus, StoreCheck};
use members::Members;

use crate::config::EtcdConfig;
use crate::core::names::ClusterName;
use crate::core::records::{ClusterRecords, Transaction};
use crate::dcs::schema::{self, Found, Objects, Root};
use crate::ports::{Dcs, DcsError};

/// Largest answer that we take. tonic's own limit of 4 MiB would make a cluster unreadable after some ten thousand
/// elections, since history and timelines are never deleted.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

const READ: &str = "read the cluster's records";

pub struct EtcdDcs {
    config: Arc<EtcdConfig>,
    root: Root,
    members: Arc<Members>,
    /// Objects of the last read, whose unknown fields are kept. Shared with separate handles: the lease keeper only writes.
    objects: Arc<Mutex<Objects>>,
    changes: Arc<Sender<u64>>,
    /// Aborted when this is dropped.
    _tasks: JoinSet<()>,
}

impl EtcdDcs {
    /// Checks the settings and begins to connect; does not wait for etcd. Call it inside the runtime that shall drive the
    /// connections. Errors are of the settings: files that cannot be read, no endpoints.
    pub fn connect(config: &EtcdConfig, cluster: &ClusterName) -> Result<EtcdDcs, DcsError> {
        let root = Root::new(&config.prefix, cluster);
        let config = Arc::new(config.clone());
        let members = Arc::new(Members::new(config.clone(), root.clone())?);
        let changes = Arc::new(Sender::new(0));
        let mut tasks = JoinSet::new();
        tasks.spawn(members.clone().keep_warm());
        tasks.spawn(watch::keep_watching(members.clone(), changes.clone()));
        Ok(EtcdDcs { config, root, members, objects: Arc::default(), changes, _tasks: tasks })
    }

    /// For `config check` and the start: who answers, what they are, whether we may read and write. An error when the store
    /// cannot be used at all; what only weakens it is a warning.
    pub async fn check(&self, within: Duration) -> Result<StoreCheck, DcsError> {
        check::check(&self.members, &self.root, Instant::now() + within).await
    }
}

#[async_trait]
impl Dcs for EtcdDcs {
    async fn read(&self, within: Duration) -> Result<ClusterRecords, DcsError> {
        let root = self.root.as_str();
        let get = |client: etcd_client::Client| async move {
            // Linearizable unless asked otherwise.
            client
                .kv_client()
                .max_decoding_message_size(MAX_ANSWER)
                .get(root, Some(GetOptions::new().with_prefix()))
                .await
        };
        let (_, answer) = self.members.read(READ, Instant::now() + within, get).await?;
        let (store_id, revision) = answer.header().map_or((0, 0), |h| (h.cluster_id(), h.revision()));
        let found = answer.kvs().iter().map(|kv| Found {
            name: kv.key().strip_prefix(root.as_bytes()).unwrap_or(kv.key()),
            revision: kv.mod_revision(),
            value: kv.value(),
        });
        let (records, objects) = schema::decode(store_id, revision, found);
        *self.objects.lock().unwrap_or_else(PoisonError::into_inner) = objects;
        Ok(records)
    }

    async fn commit(&self, transaction: &Transaction, within: Duration) -> Result<i64, DcsError> {
        let deadline = Instant::now() + within;
        let objects = || self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        let prepared = schema::prepare(transaction, &objects())
            .map_err(|why| DcsError::Refused { what: schema::describe(transaction), why })?;
        // etcd takes the modification revision of a key that does not exist as 0.
        let compare: Vec<_> = (prepared.compare.iter())
            .map(|(name, revision)| Compare::mod_revision(self.root.key(name), CompareOp::Equal, *revision))
            .collect();
        let operations: Vec<_> = (prepared.write.iter())
            .map(|(name, value)| match value {
                Some(value) => TxnOp::put(self.root.key(name), value.as_slice(), None),
                None => TxnOp::delete(self.root.key(name), None),
            })
            .collect();
        let txn = Txn::new().when(compare).and_then(operations);
        let send = |mut client: etcd_client::Client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        };
        let answer = self.members.write(&prepared.what, deadline, send).await?;
        if !answer.succeeded() {
            return Err(DcsError::Conflict { what: prepared.what });
        }
        prepared.applied(&mut objects());
        Ok(answer.header().map_or(0, |h| h.revision()))
    }

    fn changes(&self) -> Receiver<u64> {
        self.changes.subscribe()
    }

    /// The new handle's connections live on the runtime that awaits its calls. Its `changes()` are those of this handle.
    async fn separate(&self) -> Result<Box<dyn Dcs>, DcsError> {
        Ok(Box::new(EtcdDcs {
            config: self.config.clone(),
            root: self.root.clone(),
            members: Arc::new(Members::new(self.config.clone(), self.root.clone())?),
            objects: self.objects.clone(),
            changes: self.changes.clone(),
            _tasks: JoinSet::new(),
        }))
    }
}
