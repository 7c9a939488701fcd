//! Files that belong to PostgreSQL's operating system user, written so that a crash leaves the old or the new one.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, User};

use crate::ports::PostgresError;

/// Whom PostgreSQL's files and processes belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// The agent is root: files are handed over, programs change their user.
    pub switch: bool,
}

impl Owner {
    /// `os_user` when the agent is root, else the agent's own user.
    pub fn find(os_user: &str) -> Result<Owner, PostgresError> {
        let me = Uid::effective();
        if !me.is_root() {
            let name = User::from_uid(me).ok().flatten().map(|u| u.name).unwrap_or_default();
            let gid = Gid::effective().as_raw();
            return Ok(Owner { name, uid: me.as_raw(), gid, groups: Vec::new(), switch: false });
        }
        let what = format!("find operating system user `{os_user}`");
        let user = User::from_name(os_user).map_err(|e| broken(&what, e))?.ok_or_else(|| {
            broken(&what, "there is none; PostgreSQL refuses to run as root: create it or set postgresql.os_user")
        })?;
        if user.uid.is_root() {
            return Err(broken(&what, "it is root, and PostgreSQL refuses to run as root: set postgresql.os_user"));
        }
        let c_name = std::ffi::CString::new(os_user).map_err(|e| broken(&what, e))?;
        let groups = nix::unistd::getgrouplist(&c_name, user.gid).map_err(|e| broken(&what, e))?;
        let groups = groups.into_iter().map(Gid::as_raw).collect();
        Ok(Owner { name: user.name, uid: user.uid.as_raw(), gid: user.gid.as_raw(), groups, switch: true })
    }

    pub fn take(&self, path: &Path) -> Result<(), PostgresError> {
        if self.switch {
            std::os::unix::fs::chown(path, Some(self.uid), Some(self.gid))
                .map_err(|e| broken(&format!("give {} to {}", path.display(), self.name), e))?;
        }
        Ok(())
    }

    /// A directory of the owner's with mode 0700, made with what is missing above it.
    pub fn directory(&self, path: &Path) -> Result<(), PostgresError> {
        let what = format!("make directory {}", path.display());
        if !path.is_dir() {
            if let Some(parent) = path.parent() {
                // Parents stay the agent's: passable for the owner, not readable.
                fs::DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(|e| broken(&what, e))?;
            }
            match fs::DirBuilder::new().mode(0o700).create(path) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(broken(&what, e)),
            }
        }
        self.take(path)?;
        self.check_passable(path)
    }

    /// PostgreSQL's user must be able to walk to its files; a state directory of mode 0700 would stop it with a riddle.
    fn check_passable(&self, path: &Path) -> Result<(), PostgresError> {
        for above in path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()) {
            let Ok(meta) = fs::metadata(above) else { continue };
            let bits = if meta.uid() == self.uid {
                meta.mode() >> 6
            } else if meta.gid() == self.gid || self.groups.contains(&meta.gid()) {
                meta.mode() >> 3
            } else {
                meta.mode()
            };
            if bits & 1 == 0 {
                let above = above.display();
                let why = format!("user {} cannot pass {above}: chmod o+x {above}", self.name);
                return Err(broken(&format!("use {}", path.display()), why));
            }
        }
        Ok(())
    }

    /// Replaces a file in one step. `durable`: on disk when this returns; without it a power loss may bring the old one
    /// back, which is right where every start writes the file anew.
    pub fn write(&self, path: &Path, content: &str, durable: bool) -> Result<(), PostgresError> {
        let what = format!("write {}", path.display());
        let temporary = beside(path, ".new");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(|e| broken(&what, e))?;
        file.write_all(content.as_bytes()).map_err(|e| broken(&what, e))?;
        self.take(&temporary)?;
        if durable {
            file.sync_all().map_err(|e| broken(&what, e))?;
        }
        fs::rename(&temporary, path).map_err(|e| broken(&what, e))?;
        if durable { sync_parent(path) } else { Ok(()) }
    }
}

pub fn broken(what: &str, why: impl std::fmt::Display) -> PostgresError {
    PostgresError::Broken { what: what.to_owned(), why: why.to_string() }
}

/// `path` with something appended to its last part.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Makes a rename, creation or removal in a directory durable.
pub fn sync_parent(path: &Path) -> Result<(), PostgresError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| broken(&format!("fsync directory {}", parent.display()), e))
}

/// Removes a file durably; one that is not there is fine.
pub fn remove(path: &Path) -> Result<(), PostgresError> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(broken(&format!("remove {}", path.display()), e)),
    }
}

/// The content, or `None` when there is no such file.
pub fn read_if_there(path: &Path) -> Result<Option<String>, PostgresError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(broken(&format!("read {}", path.display()), e)),
    }
}

/// True for a directory that is missing or has nothing in it.
pub fn is_empty_directory(path: &Path) -> std::io::Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
    }
}

pub fn restrict(path: &Path, mode: u32) -> Result<(), PostgresError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|e| broken(&format!("set mode of {}", path.display()), e))
}
