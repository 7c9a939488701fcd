//! Which backend a cancel key means, and what the session has to know of cancels that were passed to it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// The backend of one session, as cancels see it.
#[derive(Debug, Default)]
pub struct Target {
    /// PostgreSQL's own key; empty: none was told.
    backend_key: Mutex<Bytes>,
    begun: AtomicU64,
    ended: AtomicU64,
    busy: AtomicBool,
}

impl Target {
    pub fn set_key(&self, key: Bytes) {
        *self.backend_key.lock().unwrap_or_else(PoisonError::into_inner) = key;
    }

    pub fn key(&self) -> Bytes {
        self.backend_key.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Relaxed);
    }

    /// Nothing to cancel: PostgreSQL would ignore it, or worse, hit what comes next.
    pub fn is_idle(&self) -> bool {
        !self.busy.load(Ordering::Relaxed)
    }

    /// To be held from before the cancel is sent until PostgreSQL has closed the connection that carried it: until then
    /// it may hit whatever runs.
    pub fn cancelling(self: &Arc<Target>) -> Cancelling {
        self.begun.fetch_add(1, Ordering::SeqCst);
        Cancelling { target: self.clone() }
    }

    /// Grows with every cancel that begins and with every one that ends.
    pub fn cancels(&self) -> u64 {
        self.begun.load(Ordering::SeqCst) + self.ended.load(Ordering::SeqCst)
    }

    pub fn cancel_under_way(&self) -> bool {
        self.begun.load(Ordering::SeqCst) != self.ended.load(Ordering::SeqCst)
    }
}

/// A cancel under way. Dropped without `done` (no answer, a broken connection) it may still hit: then it counts as under
/// way for the rest of the session.
pub struct Cancelling {
    target: Arc<Target>,
}

impl Cancelling {
    pub fn done(self) {
        self.target.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// All keys that this gate has given out and whose sessions live.
#[derive(Clone, Debug, Default)]
pub struct Keys(Arc<Mutex<HashMap<Bytes, Arc<Target>>>>);

/// A key's place in the table; dropped with its session.
pub struct Entry {
    key: Bytes,
    keys: Keys,
}

impl Keys {
    /// `None`: somebody has this key already; make another one.
    pub fn insert(&self, key: Bytes, target: Arc<Target>) -> Option<Entry> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.contains_key(&key) {
            return None;
        }
        table.insert(key.clone(), target);
        Some(Entry { key, keys: self.clone() })
    }

    pub fn find(&self, key: &[u8]) -> Option<Arc<Target>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.keys.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_lives_as_long_as_its_session() {
        let keys = Keys::default();
        let target = Arc::new(Target::default());
        let entry = keys.insert(Bytes::from_static(b"12345678"), target.clone());
        assert!(entry.is_some() && keys.insert(Bytes::from_static(b"12345678"), target).is_none());
        assert!(keys.find(b"12345678").is_some() && keys.find(b"12345679").is_none());
        drop(entry);
        assert!(keys.find(b"12345678").is_none());
    }

    #[test]
    fn a_cancel_is_seen_while_it_is_under_way_and_after() {
        let target = Arc::new(Target::default());
        let before = target.cancels();
        let cancelling = target.cancelling();
        let during = target.cancels();
        assert!(during > before && target.cancel_under_way());
        cancelling.done();
        assert!(target.cancels() > during && !target.cancel_under_way());
        drop(target.cancelling());
        assert!(target.cancel_under_way(), "nobody knows when it hits");
    }
}
