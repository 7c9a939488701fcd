//! A file system of its own for a member's data: to be frozen, filled, and taken away again.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::DemoError;

/// A mounted file system. Dropped, it is thawed and unmounted, and its loop device is given back.
pub struct Disk {
    pub mounted: PathBuf,
    device: Option<PathBuf>,
}

impl Disk {
    /// Mounts it in place of `directory`, with the same owner.
    pub async fn mount(device: &Path, directory: PathBuf) -> Result<Disk, DemoError> {
        let owner = owner(&directory)?;
        run("mount", &[device, &directory]).await?;
        Disk::mounted(directory, None, owner)
    }

    /// An ext4 in `file`, on a loop device. The error says why there is none here.
    pub async fn on_loop(file: &Path, bytes: u64, directory: PathBuf) -> Result<Disk, DemoError> {
        let owner = owner(&directory)?;
        let made = std::fs::File::create(file).and_then(|made| made.set_len(bytes));
        made.map_err(|error| DemoError::failed(format!("make {}", file.display()), error))?;
        run("mkfs.ext4", &[Path::new("-q"), Path::new("-F"), file]).await?;
        let device = run("losetup", &[Path::new("--find"), Path::new("--show"), file]).await?;
        let device = PathBuf::from(device.trim());
        if let Err(error) = run("mount", &[&device, &directory]).await {
            quietly("losetup", &[Path::new("-d"), &device]);
            return Err(error);
        }
        Disk::mounted(directory, Some(device), owner)
    }

    /// In memory, with so much room.
    pub async fn in_memory(bytes: u64, directory: PathBuf) -> Result<Disk, DemoError> {
        let owner = owner(&directory)?;
        let size = format!("size={bytes}");
        run(
            "mount",
            &[Path::new("-t"), Path::new("tmpfs"), Path::new("-o"), Path::new(&size), Path::new("tmpfs"), &directory],
        )
        .await?;
        Disk::mounted(directory, None, owner)
    }

    fn mounted(mounted: PathBuf, device: Option<PathBuf>, owner: (u32, u32)) -> Result<Disk, DemoError> {
        let disk = Disk { mounted, device };
        std::os::unix::fs::chown(&disk.mounted, Some(owner.0), Some(owner.1))
            .map_err(|error| DemoError::failed(format!("prepare {}", disk.mounted.display()), error))?;
        Ok(disk)
    }

    pub async fn freeze(&self) -> Result<(), DemoError> {
        run("fsfreeze", &[Path::new("-f"), &self.mounted]).await.map(drop)
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
        if let Some(device) = &self.device {
            quietly("losetup", &[Path::new("-d"), device]);
        }
    }
}

fn owner(directory: &Path) -> Result<(u32, u32), DemoError> {
    let meta = std::fs::metadata(directory);
    let meta = meta.map_err(|error| DemoError::failed(format!("prepare {}", directory.display()), error))?;
    Ok((meta.uid(), meta.gid()))
}

async fn run(program: &str, arguments: &[&Path]) -> Result<String, DemoError> {
    let failed = |why: &dyn std::fmt::Display| DemoError::failed(format!("run {program}"), why);
    let run = tokio::process::Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = run.await.map_err(|error| failed(&error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(&String::from_utf8_lossy(&output.stderr).trim()))
}

fn quietly(program: &str, arguments: &[&Path]) {
    let mut command = std::process::Command::new(program);
    let _ = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}
