//! What a member must not forget: identity, incarnation, promise and seal, the highest term seen, the store, its own term
//! while it leads. One file outside PGDATA, one fsync, lost together (protocol §0, incarnation).
//!
//! Promise and seal are one variable: each is refused by what stands in the place of the other, under one lock, and is on
//! disk before anybody hears of it (protocol §7).
//!
//! The directory is locked for as long as this value lives: a second agent on it is refused before it touches anything (S7).

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::core::Moment;
use crate::core::names::{ClusterName, Incarnation, MemberId, MemberName};
use crate::core::promise::{Bond, Denied, Lead, Promise, refuses_promise, refuses_seal};
use crate::core::timeline::Term;
use crate::core::view::Durable;

const FILE: &str = "state.json";
const LOCK: &str = "lock";
const VERSION: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error(
        "{path} is locked: another pgvigil agent works on this state directory; stop it, or give this one a state_dir of its own"
    )]
    Locked { path: PathBuf },
    #[error(
        "{path} cannot be read as a state file ({why}); it holds this member's promises, so nothing is done without it: restore \
         it, or set the data directory and this file aside and let the member be cloned anew"
    )]
    Damaged { path: PathBuf, why: String },
    #[error(
        "{path} belongs to member `{found_member}` of cluster `{found_cluster}`, the configuration says `{member}` of \
         `{cluster}`: wrong state_dir, or the name was changed"
    )]
    Another { path: PathBuf, found_member: String, found_cluster: String, member: MemberName, cluster: ClusterName },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Contents {
    v: u32,
    cluster: ClusterName,
    member: MemberName,
    incarnation: Incarnation,
    start_counter: u64,
    /// As text: beyond what JSON readers keep exactly.
    system_identifier: Option<String>,
    durable: Durable,
}

/// The state file, open and locked.
#[derive(Debug)]
pub struct StateFile {
    directory: PathBuf,
    contents: Contents,
    /// Until when the promise in the file binds, by this process's clocks. `None`: not counted yet in this life.
    bound_until: Option<Moment>,
    /// A term that this member is about to claim in the store: from here on nobody is promised a lower one.
    standing: Option<Term>,
    _lock: Flock<File>,
}

impl StateFile {
    /// Locks the directory, reads or begins the state, counts this start, and has it on disk when it returns.
    pub fn open(directory: &Path, cluster: &ClusterName, member: &MemberName) -> Result<StateFile, StateError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { action, path, source }
        };
        fs::create_dir_all(directory).map_err(io("create", directory))?;
        let lock_path = directory.join(LOCK);
        let lock_file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        let lock = Flock::lock(lock_file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => StateError::Locked { path: lock_path.clone() },
            other => StateError::Io { action: "lock", path: lock_path.clone(), source: other.into() },
        })?;
        let path = directory.join(FILE);
        let contents = match fs::read(&path) {
            Ok(bytes) => read(&path, &bytes, cluster, member)?,
            Err(e) if e.kind() == ErrorKind::NotFound => Contents {
                v: VERSION,
                cluster: cluster.clone(),
                member: member.clone(),
                incarnation: new_incarnation(),
                start_counter: 0,
                system_identifier: None,
                durable: Durable::default(),
            },
            Err(e) => return Err(io("read", &path)(e)),
        };
        let mut state =
            StateFile { directory: directory.to_owned(), contents, bound_until: None, standing: None, _lock: lock };
        state.change(|c| c.start_counter += 1)?;
        Ok(state)
    }

    pub fn id(&self) -> MemberId {
        MemberId { name: self.contents.member.clone(), incarnation: self.contents.incarnation }
    }

    pub fn start_counter(&self) -> u64 {
        self.contents.start_counter
    }

    pub fn system_identifier(&self) -> Option<u64> {
        self.contents.system_identifier.as_ref().and_then(|text| text.parse().ok())
    }

    pub fn durable(&self) -> &Durable {
        &self.contents.durable
    }

    /// Never goes back: what was remembered stays remembered.
    pub fn remember(
        &mut self,
        term: Term,
        sync_term: Term,
        store_id: u64,
        store_revision: i64,
    ) -> Result<(), StateError> {
        self.change(|c| {
            let d = &mut c.durable;
            d.highest_term = d.highest_term.max(term);
            d.highest_sync_term = d.highest_sync_term.max(sync_term);
            if store_id != d.store_id {
                d.store_id = store_id;
                d.store_revision = store_revision;
            }
            d.store_revision = d.store_revision.max(store_revision);
        })
    }

    /// The store was seen to be another one or to have gone back; kept until [`StateFile::accept_store`].
    pub fn distrust_store(&mut self) -> Result<(), StateError> {
        if self.contents.durable.store_lost {
            return Ok(());
        }
        self.change(|c| c.durable.store_lost = true)
    }

    /// Somebody made the store good under a term above every one that this member remembers: from here on it counts.
    pub fn accept_store(
        &mut self,
        term: Term,
        sync_term: Term,
        store_id: u64,
        store_revision: i64,
    ) -> Result<(), StateError> {
        self.change(|c| {
            let d = &mut c.durable;
            d.highest_term = d.highest_term.max(term);
            d.highest_sync_term = d.highest_sync_term.max(sync_term);
            (d.store_id, d.store_revision, d.store_lost) = (store_id, store_revision, false);
        })
    }

    /// What this leader has to know of its term when nobody can be asked.
    pub fn remember_lead(&mut self, lead: &Lead) -> Result<(), StateError> {
        if self.contents.durable.lead.as_ref() == Some(lead) {
            return Ok(());
        }
        self.change(|c| c.durable.lead = Some(lead.clone()))
    }

    // === Promise and seal ===

    /// The member's word for `term`: no WAL of a lower one any more. On disk before anybody hears of it.
    pub fn seal(&mut self, term: Term, now: Moment) -> Result<Result<(), Denied>, StateError> {
        let bond = self.bond(now);
        if let Err(denied) = refuses_seal(&self.contents.durable, bond.as_ref(), term, now) {
            return Ok(Err(denied));
        }
        if self.contents.durable.sealed_term < term {
            self.change(|c| {
                c.durable.sealed_term = term;
                c.durable.highest_term = c.durable.highest_term.max(term);
                c.durable.promise = c.durable.promise.take().filter(|promise| promise.term >= term);
            })?;
        }
        Ok(Ok(()))
    }

    /// The member's word to the leader of `term`: no part in a higher one until its clocks have run for `length` from now.
    /// Refused once a higher one is sealed, stood for, or known: that leader's time is over.
    pub fn promise(&mut self, promise: Promise, now: Moment) -> Result<Result<(), Denied>, StateError> {
        let bond = self.bond(now);
        if let Err(denied) = refuses_promise(&self.contents.durable, bond.as_ref(), self.standing, &promise, now) {
            return Ok(Err(denied));
        }
        let until = now.plus(promise.length());
        // What stands in the file runs anew after a restart, so the same word again needs no second fsync.
        if self.contents.durable.promise.as_ref() != Some(&promise) {
            self.change(|c| c.durable.promise = Some(promise))?;
        }
        self.bound_until = Some(self.bound_until.map_or(until, |before| before.latest(until)));
        Ok(Ok(()))
    }

    /// The promise that still runs. After a restart a stored one runs its whole length again: when it was given is known to
    /// no clock of this life.
    pub fn bond(&mut self, now: Moment) -> Option<Bond> {
        let promise = self.contents.durable.promise.clone()?;
        let until = *self.bound_until.get_or_insert_with(|| now.plus(promise.length()));
        Some(Bond { promise, until })
    }

    /// The holder itself said that it is finished, or the promise has run out: it binds nobody any more.
    pub fn end_promise(&mut self, to: &MemberId, term: Term) -> Result<(), StateError> {
        if self.contents.durable.promise.as_ref().is_none_or(|p| p.to != *to || p.term != term) {
            return Ok(());
        }
        self.change(|c| c.durable.promise = None)?;
        self.bound_until = None;
        Ok(())
    }

    /// Before `term` is claimed in the store for this member: refused like a seal, and nobody is promised a lower term from
    /// here on.
    pub fn stand(&mut self, term: Term, now: Moment) -> Result<(), Denied> {
        let bond = self.bond(now);
        refuses_seal(&self.contents.durable, bond.as_ref(), term, now)?;
        self.standing = Some(term);
        Ok(())
    }

    /// The store was read again: what was stood for stands in it, or does not.
    pub fn stand_down(&mut self) {
        self.standing = None;
    }

    pub fn join(&mut self, system_identifier: u64) -> Result<(), StateError> {
        self.change(|c| c.system_identifier = Some(system_identifier.to_string()))
    }

    /// The data directory begins another life. `copied` or rewound data are of no use without their leader's WAL.
    pub fn begin_incarnation(&mut self, copied: bool) -> Result<(), StateError> {
        self.change(|c| {
            c.incarnation = new_incarnation();
            c.durable.must_follow |= copied;
        })
    }

    /// Whether the data need a leader's WAL before they are consistent.
    pub fn must_follow(&mut self, must: bool) -> Result<(), StateError> {
        if self.contents.durable.must_follow == must {
            return Ok(());
        }
        self.change(|c| c.durable.must_follow = must)
    }

    /// PostgreSQL accepts connections as a standby: what was copied or rewound is consistent.
    pub fn is_consistent(&mut self) -> Result<(), StateError> {
        self.must_follow(false)
    }

    fn change(&mut self, change: impl FnOnce(&mut Contents)) -> Result<(), StateError> {
        let mut next = self.contents.clone();
        change(&mut next);
        self.write(&next)?;
        self.contents = next;
        Ok(())
    }

    /// Temporary file, fsync, rename, fsync of the directory: whole or not at all.
    fn write(&self, contents: &Contents) -> Result<(), StateError> {
        let path = self.directory.join(FILE);
        let temporary = self.directory.join("state.json.new");
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { action, path, source }
        };
        let text = serde_json::to_vec_pretty(contents)
            .map_err(|e| StateError::Damaged { path: path.clone(), why: e.to_string() })?;
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(io("create", &temporary))?;
        file.write_all(&text).map_err(io("write", &temporary))?;
        file.sync_all().map_err(io("fsync", &temporary))?;
        fs::rename(&temporary, &path).map_err(io("rename", &temporary))?;
        File::open(&self.directory).and_then(|directory| directory.sync_all()).map_err(io("fsync", &self.directory))
    }
}

fn read(path: &Path, bytes: &[u8], cluster: &ClusterName, member: &MemberName) -> Result<Contents, StateError> {
    let damaged = |why: String| StateError::Damaged { path: path.to_owned(), why };
    let contents: Contents = serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
    if contents.v != VERSION {
        return Err(damaged(format!("version {} is not {VERSION}", contents.v)));
    }
    if contents.system_identifier.as_ref().is_some_and(|text| text.parse::<u64>().is_err()) {
        return Err(damaged("system_identifier is not a number".to_owned()));
    }
    if contents.cluster != *cluster || contents.member != *member {
        return Err(StateError::Another {
            path: path.to_owned(),
            found_member: contents.member.to_string(),
            found_cluster: contents.cluster.to_string(),
            member: member.clone(),
            cluster: cluster.clone(),
        });
    }
    Ok(contents)
}

fn new_incarnation() -> Incarnation {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the kernel's random numbers are there since boot");
    Incarnation(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: Moment = Moment::at(3_600_000_000_000);

    fn open(directory: &Path) -> Result<StateFile, StateError> {
        let cluster = ClusterName::new("maas").unwrap();
        StateFile::open(directory, &cluster, &MemberName::new("node-a").unwrap())
    }

    #[test]
    fn identity_and_seals_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = open(directory.path()).unwrap();
        let id = first.id();
        first.seal(Term(4), NOW).unwrap().unwrap();
        first.join(u64::MAX).unwrap();
        drop(first);
        let mut second = open(directory.path()).unwrap();
        assert_eq!(second.id(), id);
        assert_eq!(second.start_counter(), 2);
        assert_eq!(second.system_identifier(), Some(u64::MAX));
        assert_eq!(second.durable().sealed_term, Term(4));
        assert_eq!(
            second.seal(Term(3), NOW).unwrap(),
            Err(Denied::HigherTerm { term: Term(4) }),
            "a lower term must be refused after a higher one was sealed"
        );
    }

    #[test]
    fn what_was_remembered_never_goes_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.remember(Term(7), Term(6), 1, 100).unwrap();
        state.remember(Term(3), Term(2), 1, 50).unwrap();
        drop(state);
        let mut state = open(directory.path()).unwrap();
        let durable = state.durable().clone();
        assert_eq!((durable.highest_term, durable.highest_sync_term, durable.store_revision), (Term(7), Term(6), 100));
        state.seal(Term(9), NOW).unwrap().unwrap();
        assert_eq!(state.durable().highest_term, Term(9));
    }

    fn promise(to: &str, term: u64) -> Promise {
        Promise { to: crate::core::testing::id(to), term: Term(term), length_ms: 8_162 }
    }

    /// Under one lock, in whichever order they come: never both.
    #[test]
    fn promise_and_seal_are_one_variable() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.promise(promise("a", 5), NOW).unwrap().unwrap();
        let before = fs::read(directory.path().join(FILE)).unwrap();
        let denied = state.seal(Term(6), NOW.plus(Duration::from_millis(8_161))).unwrap();
        assert!(matches!(denied, Err(Denied::Bound { .. })), "{denied:?}");
        assert_eq!(state.durable().sealed_term, Term(0));
        assert_eq!(fs::read(directory.path().join(FILE)).unwrap(), before);

        let mut one_clock_late = NOW.plus(Duration::from_millis(8_162));
        one_clock_late.boottime -= 1;
        assert!(state.seal(Term(6), one_clock_late).unwrap().is_err(), "all clocks have to say so");
        state.seal(Term(6), NOW.plus(Duration::from_millis(8_162))).unwrap().unwrap();
        assert_eq!(state.durable().promise, None);
        let late = NOW.plus(Duration::from_secs(60));
        assert_eq!(state.promise(promise("a", 5), late).unwrap(), Err(Denied::HigherTerm { term: Term(6) }));
        state.promise(promise("b", 6), late).unwrap().unwrap();
    }

    #[test]
    fn the_term_that_was_promised_may_be_sealed() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.promise(promise("a", 5), NOW).unwrap().unwrap();
        state.seal(Term(5), NOW).unwrap().unwrap();
        assert!(state.seal(Term(6), NOW).unwrap().is_err(), "and still binds");
    }

    #[test]
    fn a_stored_promise_runs_its_whole_length_again_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.promise(promise("a", 5), NOW).unwrap().unwrap();
        drop(state);
        let mut state = open(directory.path()).unwrap();
        // The clocks of another boot: they may show less than before.
        let booted = Moment::at(1_000);
        assert!(state.seal(Term(6), booted).unwrap().is_err());
        let bond = state.bond(booted).unwrap();
        assert_eq!(bond.until, booted.plus(Duration::from_millis(8_162)));
        state.seal(Term(6), bond.until).unwrap().unwrap();
    }

    #[test]
    fn a_known_term_is_never_promised_away() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.remember(Term(6), Term(5), 1, 100).unwrap();
        assert_eq!(state.promise(promise("a", 5), NOW).unwrap(), Err(Denied::HigherTerm { term: Term(6) }));
        state.promise(promise("a", 6), NOW).unwrap().unwrap();
        assert!(state.promise(promise("b", 6), NOW).unwrap().is_err(), "a term has one holder");
        state.promise(promise("b", 7), NOW).unwrap().unwrap();
        assert!(state.promise(promise("a", 6), NOW).unwrap().is_err(), "nor back to a lower one");
    }

    /// The coordinator is bound like anybody, and what it stands for it does not promise away.
    #[test]
    fn who_promised_does_not_stand_and_who_stands_does_not_promise() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.promise(promise("a", 5), NOW).unwrap().unwrap();
        assert!(state.stand(Term(6), NOW).is_err());
        let over = NOW.plus(Duration::from_secs(9));
        state.stand(Term(6), over).unwrap();
        assert!(state.promise(promise("a", 5), over).unwrap().is_err());
        state.stand_down();
        state.promise(promise("a", 5), over).unwrap().unwrap();
    }

    #[test]
    fn a_promise_that_was_given_back_does_not_bind() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.promise(promise("a", 5), NOW).unwrap().unwrap();
        state.end_promise(&crate::core::testing::id("b"), Term(5)).unwrap();
        assert!(state.seal(Term(6), NOW).unwrap().is_err());
        state.end_promise(&crate::core::testing::id("a"), Term(5)).unwrap();
        state.seal(Term(6), NOW).unwrap().unwrap();
    }

    #[test]
    fn a_lost_store_stays_lost_until_it_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        state.remember(Term(6), Term(6), 1, 100).unwrap();
        state.distrust_store().unwrap();
        drop(state);
        let mut state = open(directory.path()).unwrap();
        assert!(state.durable().store_lost);
        state.accept_store(Term(7), Term(7), 2, 9).unwrap();
        let durable = state.durable();
        assert_eq!((durable.store_lost, durable.store_id, durable.store_revision), (false, 2, 9));
    }

    #[test]
    fn a_second_agent_on_the_directory_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let _first = open(directory.path()).unwrap();
        assert!(matches!(open(directory.path()), Err(StateError::Locked { .. })));
    }

    #[test]
    fn copied_data_need_a_leader_until_they_are_consistent() {
        let directory = tempfile::tempdir().unwrap();
        let mut state = open(directory.path()).unwrap();
        let before = state.id();
        state.begin_incarnation(true).unwrap();
        assert_ne!(state.id(), before);
        drop(state);
        let mut state = open(directory.path()).unwrap();
        assert!(state.durable().must_follow);
        state.is_consistent().unwrap();
        assert!(!state.durable().must_follow);
    }

    #[test]
    fn a_damaged_or_foreign_file_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path()).unwrap());
        let path = directory.path().join(FILE);
        fs::write(&path, b"{ not json").unwrap();
        assert!(matches!(open(directory.path()), Err(StateError::Damaged { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"{ not json");

        let other = tempfile::tempdir().unwrap();
        drop(open(other.path()).unwrap());
        let cluster = ClusterName::new("maas").unwrap();
        let error = StateFile::open(other.path(), &cluster, &MemberName::new("node-b").unwrap()).unwrap_err();
        assert!(error.to_string().contains("node-a"), "{error}");
    }
}
