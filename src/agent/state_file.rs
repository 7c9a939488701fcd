//! What a member must not forget: identity, incarnation, seals, the highest term seen. One file outside PGDATA, one fsync,
//! lost together (protocol §0, incarnation).
//!
//! The directory is locked for as long as this value lives: a second agent on it is refused before it touches anything (S7).

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::core::names::{ClusterName, Incarnation, MemberId, MemberName};
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
        let mut state = StateFile { directory: directory.to_owned(), contents, _lock: lock };
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

    /// The member's word for `term`: on disk before anybody hears of it. False: a higher term is sealed already.
    pub fn seal(&mut self, term: Term) -> Result<bool, StateError> {
        if self.contents.durable.sealed_term > term {
            return Ok(false);
        }
        if self.contents.durable.sealed_term < term {
            self.change(|c| {
                c.durable.sealed_term = term;
                c.durable.highest_term = c.durable.highest_term.max(term);
            })?;
        }
        Ok(true)
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
    use super::*;

    fn open(directory: &Path) -> Result<StateFile, StateError> {
        let cluster = ClusterName::new("maas").unwrap();
        StateFile::open(directory, &cluster, &MemberName::new("node-a").unwrap())
    }

    #[test]
    fn identity_and_seals_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let mut first = open(directory.path()).unwrap();
        let id = first.id();
        assert!(first.seal(Term(4)).unwrap());
        first.join(u64::MAX).unwrap();
        drop(first);
        let mut second = open(directory.path()).unwrap();
        assert_eq!(second.id(), id);
        assert_eq!(second.start_counter(), 2);
        assert_eq!(second.system_identifier(), Some(u64::MAX));
        assert_eq!(second.durable().sealed_term, Term(4));
        assert!(!second.seal(Term(3)).unwrap(), "a lower term must be refused after a higher one was sealed");
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
        assert!(state.seal(Term(9)).unwrap());
        assert_eq!(state.durable().highest_term, Term(9));
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
