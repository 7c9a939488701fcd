//! The store in memory, for tests and simulation: etcd's semantics (contract tests hold it to them), and its faults on demand.
//!
//! One [`MemoryStore`] is shared by all agents of a test; each agent has a [`MemoryDcs`] of its own, whose faults are its own
//! as well (a clone, or what `separate()` gives, is the same agent). Nothing happens by chance and no clock is read. A call
//! that gets no answer waits on tokio's timer, which a test with paused time drives.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::core::names::ClusterName;
use crate::core::records::{ClusterRecords, Transaction};
use crate::dcs::schema::{self, Found, Objects, Prepared, Root};
use crate::ports::{Dcs, DcsError};

const READ: &str = "read the cluster's records";

/// What all agents share. Cloning gives another reference to the same store.
#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Contents>>);

#[derive(Default)]
struct Contents {
    id: u64,
    data: Data,
    /// Transactions whose senders gave up waiting and which may still be applied.
    held: VecDeque<(Root, Prepared)>,
    agents: Vec<Weak<Agent>>,
}

#[derive(Clone, Default)]
struct Data {
    revision: i64,
    keys: BTreeMap<String, (i64, Vec<u8>)>,
}

/// What a backup of the store would hold.
#[derive(Clone)]
pub struct Snapshot(Data);

/// How an agent's network to the store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    #[default]
    Up,
    /// Every call fails at once; nothing arrives.
    Refused,
    /// Every call waits out its deadline; nothing arrives.
    Silent,
}

/// What happens to one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Fails at once, nothing was done.
    Fail,
    /// Waits out its deadline, nothing was done.
    Hang,
    /// A commit is applied, its answer does not come.
    LoseReply,
    /// A commit gets no answer and is applied only when [`MemoryStore::land`] says so, by the revisions of that time.
    Hold,
}

struct Agent {
    state: Mutex<Condition>,
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct Condition {
    link: Link,
    next: VecDeque<Fault>,
}

/// One agent's way to the store.
#[derive(Clone)]
pub struct MemoryDcs {
    store: MemoryStore,
    root: Root,
    agent: Arc<Agent>,
    objects: Arc<Mutex<Objects>>,
}

// === impl MemoryStore ===

impl MemoryStore {
    pub fn new(id: u64) -> MemoryStore {
        MemoryStore(Arc::new(Mutex::new(Contents { id, ..Default::default() })))
    }

    /// A handle for one more agent, under the usual prefix.
    pub fn agent(&self, cluster: &ClusterName) -> MemoryDcs {
        let agent = Arc::new(Agent { state: Mutex::default(), changes: watch::Sender::new(0) });
        lock(&self.0).agents.push(Arc::downgrade(&agent));
        MemoryDcs {
            store: self.clone(),
            root: Root::new("/pgvigil", cluster),
            agent,
            objects: Arc::new(Mutex::new(Objects::new())),
        }
    }

    /// What stands under a whole key (`/pgvigil/<cluster>/leader`).
    pub fn value(&self, key: &str) -> Option<Vec<u8>> {
        lock(&self.0).data.keys.get(key).map(|(_, value)| value.clone())
    }

    /// As a person with etcdctl.
    pub fn put(&self, key: &str, value: impl Into<Vec<u8>>) -> i64 {
        let value = value.into();
        self.change(|data| {
            data.revision += 1;
            data.keys.insert(key.to_owned(), (data.revision, value));
        })
    }

    pub fn delete(&self, key: &str) -> i64 {
        self.change(|data| {
            if data.keys.remove(key).is_some() {
                data.revision += 1;
            }
        })
    }

    /// All of it lost; what comes back is an empty store with another identity.
    pub fn wipe(&self, id: u64) {
        self.restore(Snapshot(Data::default()), id);
    }

    pub fn snapshot(&self) -> Snapshot {
        Snapshot(lock(&self.0).data.clone())
    }

    /// Goes back to `snapshot`; etcd gives a restored store another identity, unless forced.
    pub fn restore(&self, snapshot: Snapshot, id: u64) {
        lock(&self.0).id = id;
        self.change(|data| *data = snapshot.0);
    }

    /// Applies (or finds in conflict) the oldest transaction that was held back. `None`: there is none.
    pub fn land(&self) -> Option<Result<i64, DcsError>> {
        let (root, prepared) = lock(&self.0).held.pop_front()?;
        Some(self.apply(&root, &prepared))
    }

    /// Transactions that may still land.
    pub fn held(&self) -> usize {
        lock(&self.0).held.len()
    }

    fn apply(&self, root: &Root, prepared: &Prepared) -> Result<i64, DcsError> {
        let mut contents = lock(&self.0);
        let revision_of = |name: &str| contents.data.keys.get(&root.key(name)).map_or(0, |(revision, _)| *revision);
        if prepared.compare.iter().any(|(name, revision)| revision_of(name) != *revision) {
            return Err(DcsError::Conflict { what: prepared.what.clone() });
        }
        let data = &mut contents.data;
        let next = data.revision + 1;
        for (name, value) in &prepared.write {
            let key = root.key(name);
            let changed = match value {
                Some(value) => {
                    data.keys.insert(key, (next, value.clone()));
                    true
                }
                None => data.keys.remove(&key).is_some(),
            };
            if changed {
                data.revision = next;
            }
        }
        let revision = data.revision;
        if revision == next {
            contents.tell_agents();
        }
        Ok(revision)
    }

    fn change(&self, change: impl FnOnce(&mut Data)) -> i64 {
        let mut contents = lock(&self.0);
        change(&mut contents.data);
        contents.tell_agents();
        contents.data.revision
    }
}

impl Contents {
    fn tell_agents(&mut self) {
        self.agents.retain(|agent| match agent.upgrade() {
            Some(agent) => {
                if lock(&agent.state).link == Link::Up {
                    agent.changes.send_modify(|n| *n += 1);
                }
                true
            }
            None => false,
        });
    }
}

// === impl MemoryDcs ===

impl MemoryDcs {
    /// From now on. Coming back up counts as a change, as a watch that was set up again does.
    pub fn set_link(&self, link: Link) {
        lock(&self.agent.state).link = link;
        if link == Link::Up {
            self.agent.changes.send_modify(|n| *n += 1);
        }
    }

    /// The next `times` calls of this agent that find the link up suffer `fault`, after those ordered before.
    pub fn next(&self, fault: Fault, times: usize) {
        lock(&self.agent.state).next.extend(std::iter::repeat_n(fault, times));
    }

    pub fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// The whole key of a name (`leader`, `members/node-a`).
    pub fn key(&self, name: &str) -> String {
        self.root.key(name)
    }

    fn fate(&self) -> Option<Fault> {
        let mut state = lock(&self.agent.state);
        match state.link {
            Link::Up => state.next.pop_front(),
            Link::Refused => Some(Fault::Fail),
            Link::Silent => Some(Fault::Hang),
        }
    }
}

#[async_trait]
impl Dcs for MemoryDcs {
    async fn read(&self, within: Duration) -> Result<ClusterRecords, DcsError> {
        match self.fate() {
            None => {}
            Some(Fault::Fail) => return Err(unavailable(READ.to_owned())),
            Some(Fault::Hang | Fault::LoseReply | Fault::Hold) => return Err(no_answer(READ.to_owned(), within).await),
        }
        let contents = lock(&self.store.0);
        let root = self.root.as_str();
        let found = contents.data.keys.iter().filter_map(|(key, (revision, value))| {
            Some(Found { name: key.strip_prefix(root)?.as_bytes(), revision: *revision, value })
        });
        let (records, objects) = schema::decode(contents.id, contents.data.revision, found);
        *lock(&self.objects) = objects;
        Ok(records)
    }

    async fn commit(&self, transaction: &Transaction, within: Duration) -> Result<i64, DcsError> {
        let prepared = schema::prepare(transaction, &lock(&self.objects))
            .map_err(|why| DcsError::Refused { what: schema::describe(transaction), why })?;
        match self.fate() {
            None => {
                let revision = self.store.apply(&self.root, &prepared)?;
                prepared.applied(&mut lock(&self.objects));
                Ok(revision)
            }
            Some(Fault::Fail) => Err(unavailable(prepared.what)),
            Some(Fault::Hang) => Err(no_answer(prepared.what, within).await),
            Some(Fault::LoseReply) => {
                // Whether it was applied or in conflict is exactly what the sender does not learn.
                let _ = self.store.apply(&self.root, &prepared);
                Err(no_answer(prepared.what, within).await)
            }
            Some(Fault::Hold) => {
                let what = prepared.what.clone();
                lock(&self.store.0).held.push_back((self.root.clone(), prepared));
                Err(no_answer(what, within).await)
            }
        }
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.agent.changes.subscribe()
    }

    async fn separate(&self) -> Result<Box<dyn Dcs>, DcsError> {
        Ok(Box::new(self.clone()))
    }
}

fn unavailable(what: String) -> DcsError {
    DcsError::Unavailable { what, why: "connection refused (ordered by the test)".to_owned() }
}

async fn no_answer(what: String, within: Duration) -> DcsError {
    tokio::time::sleep(within).await;
    DcsError::Timeout { what, within }
}

/// A panic while the lock was held is the test's own; what it guards is still whole between two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
