//! PostgreSQL's programs: where they are, which version, and running one to its end as PostgreSQL's user.
//!
//! A program runs in a process group of its own, which is killed when its future is dropped: pg_basebackup has a child
//! that would go on receiving WAL.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::ports::PostgresError;

use super::files::{Owner, broken};
use super::settings::SUPPORTED;

/// What a program is asked to do, with `{what}` as an operator would say it.
pub struct Run<'a> {
    pub what: &'a str,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    pub input: Option<String>,
    pub owner: &'a Owner,
}

pub struct Finished {
    pub success: bool,
    pub how: String,
    /// Standard output, then the end of standard error.
    pub output: String,
}

/// Kept of standard error: its last words tell why a program failed.
const MAX_COMPLAINT: usize = 16 << 10;
/// Kept of standard output: the list of transactions of a diverged member is there, 32 MiB are some 200 000 of them.
const MAX_OUTPUT: u64 = 32 << 20;

struct KillGroup(Option<i32>);

impl Drop for KillGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // The group is gone already when everything in it has ended: nothing to do then.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}

impl Run<'_> {
    /// Runs to the end. `line` hears every line of standard error.
    pub async fn finish(self, mut line: impl FnMut(&str)) -> Result<Finished, PostgresError> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if self.owner.switch {
            command.uid(self.owner.uid).gid(self.owner.gid);
        }
        let what = self.what;
        let mut child = command.spawn().map_err(|e| broken(what, format!("start {}: {e}", self.program.display())))?;
        let mut group = KillGroup(child.id().and_then(|id| i32::try_from(id).ok()));
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());

        let feed = async {
            if let (Some(mut stdin), Some(input)) = (stdin, self.input) {
                // A program that ends early says why on standard error; the broken pipe adds nothing.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        let told = async {
            let mut text = String::new();
            if let Some(mut stdout) = stdout {
                let mut bytes = Vec::new();
                let _ = (&mut stdout).take(MAX_OUTPUT).read_to_end(&mut bytes).await;
                // The rest is read and dropped, so that the program does not stop at a full pipe.
                let _ = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
                text = String::from_utf8_lossy(&bytes).into_owned();
            }
            text
        };
        let complained = async {
            let mut kept = String::new();
            if let Some(stderr) = stderr {
                let mut lines = BufReader::new(stderr).lines();
                while let Ok(Some(text)) = lines.next_line().await {
                    line(&text);
                    kept.push_str(&text);
                    kept.push('\n');
                    keep_end(&mut kept);
                }
            }
            kept
        };
        let ((), told, complained) = tokio::join!(feed, told, complained);
        let status = child.wait().await.map_err(|e| broken(what, format!("wait for its end: {e}")))?;
        group.0 = None;
        let output = format!("{told}{complained}").trim().to_owned();
        Ok(Finished { success: status.success(), how: status.to_string(), output })
    }

    /// As [`Run::finish`], and anything but success is an error with the program's own last words.
    pub async fn succeed(self, line: impl FnMut(&str)) -> Result<String, PostgresError> {
        let (what, program) = (self.what.to_owned(), self.program.display().to_string());
        let finished = self.finish(line).await?;
        if finished.success {
            return Ok(finished.output);
        }
        Err(broken(&what, format!("{program} ended with {}: {}", finished.how, finished.output)))
    }
}

fn keep_end(text: &mut String) {
    if text.len() > MAX_COMPLAINT {
        let mut cut = text.len() - MAX_COMPLAINT;
        while !text.is_char_boundary(cut) {
            cut += 1;
        }
        text.drain(..cut);
    }
}

/// The directory of PostgreSQL's programs: the configured one, else by the version of the data, else the newest supported.
pub fn directory(configured: Option<&Path>, data_version: Option<u32>) -> Result<PathBuf, PostgresError> {
    let what = "find the programs of postgresql";
    if let Some(directory) = configured {
        if directory.join("postgres").exists() {
            return Ok(directory.to_owned());
        }
        return Err(broken(what, format!("{} has no program `postgres`: see postgresql.bin_dir", directory.display())));
    }
    let versions: Vec<u32> = match data_version {
        Some(version) => vec![version],
        None => SUPPORTED.rev().collect(),
    };
    for version in &versions {
        for place in [format!("/usr/lib/postgresql/{version}/bin"), format!("/usr/pgsql-{version}/bin")] {
            let place = PathBuf::from(place);
            if place.join("postgres").exists() {
                return Ok(place);
            }
        }
    }
    for place in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
        if place.join("postgres").exists() && place.join("initdb").exists() {
            return Ok(place);
        }
    }
    let wanted: Vec<String> = versions.iter().map(u32::to_string).collect();
    let why = format!("none of version {} in the usual places: set postgresql.bin_dir", wanted.join(", "));
    Err(broken(what, why))
}

/// Major version out of `postgres (PostgreSQL) 15.18 (Debian …)`.
pub fn parse_version(text: &str) -> Option<u32> {
    let number = text.split_once(") ")?.1;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"), Some(15));
        assert_eq!(parse_version("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(parse_version("nonsense"), None);
    }
}
