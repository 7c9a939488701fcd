//! A file system of its own for a member's data, so that it can be frozen and filled (root).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::DemoError;

pub struct Disk {
    pub mounted: PathBuf,
}

impl Disk {
    /// Mounts a block device, or a file with a file system in it, in place of `directory`, with the same owner.
    pub async fn mount(device: &Path, directory: PathBuf) -> Result<Disk, DemoError> {
        let failed = |error| DemoError::failed(format!("prepare {}", directory.display()), error);
        let owner = std::fs::metadata(&directory).map_err(failed)?;
        run("mount", &[device, &directory]).await?;
        let disk = Disk { mounted: directory.clone() };
        std::os::unix::fs::chown(&directory, Some(owner.uid()), Some(owner.gid())).map_err(failed)?;
        Ok(disk)
    }

    pub async fn freeze(&self) -> Result<(), DemoError> {
        run("fsfreeze", &[Path::new("-f"), &self.mounted]).await
    }

    /// It may not be frozen.
    pub fn thaw(&self) {
        quietly("fsfreeze", &[Path::new("-u"), &self.mounted]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.thaw();
        // Out of the tree at once, whoever still works there: the cluster removes its directory.
        quietly("umount", &[Path::new("-l"), &self.mounted]);
    }
}

async fn run(program: &str, arguments: &[&Path]) -> Result<(), DemoError> {
    let failed = |why: &dyn std::fmt::Display| DemoError::failed(format!("run {program}"), why);
    let run = tokio::process::Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = run.await.map_err(|error| failed(&error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(&String::from_utf8_lossy(&output.stderr).trim()))
}

fn quietly(program: &str, arguments: &[&Path]) {
    let mut command = std::process::Command::new(program);
    let _ = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}
