//! What people and other programs do to etcd.

use std::path::Path;
use std::time::Duration;

use etcd_client::{AlarmAction, AlarmType, Client, CompactionOptions, DeleteOptions};
use nix::sys::signal::Signal;

use super::hosts;
use super::stage::Stage;

const ANSWER: Duration = Duration::from_secs(5);

impl Stage {
    async fn store(&self) -> Result<Client, String> {
        let connect = Client::connect(self.cluster.etcd.endpoints(), None);
        let client = tokio::time::timeout(ANSWER, connect).await.map_err(|_| "etcd does not answer".to_owned())?;
        client.map_err(|error| error.to_string())
    }

    fn key(&self, name: &str) -> String {
        format!("/pgvigil/{}/{name}", self.cluster.name)
    }

    /// Index of the member that leads etcd.
    pub async fn store_leader(&self) -> Result<usize, String> {
        let begun = std::time::Instant::now();
        while begun.elapsed() < ANSWER * 4 {
            for (index, endpoint) in self.cluster.etcd.endpoints().into_iter().enumerate() {
                let ask = async {
                    let status = Client::connect([endpoint], None).await?.status().await?;
                    let me = status.header().map_or(0, etcd_client::ResponseHeader::member_id);
                    Ok::<bool, etcd_client::Error>(me != 0 && me == status.leader())
                };
                if matches!(tokio::time::timeout(Duration::from_secs(1), ask).await, Ok(Ok(true))) {
                    return Ok(index);
                }
            }
        }
        Err("etcd has no leader".to_owned())
    }

    pub async fn store_delete(&mut self, name: &str) -> Result<(), String> {
        let key = self.key(name);
        self.store().await?.delete(key, None).await.map(|_| ()).map_err(|error| error.to_string())
    }

    pub async fn store_put(&mut self, name: &str, text: &str) -> Result<(), String> {
        let key = self.key(name);
        self.store().await?.put(key, text, None).await.map(|_| ()).map_err(|error| error.to_string())
    }

    pub async fn store_wipe(&mut self) -> Result<(), String> {
        let options = DeleteOptions::new().with_prefix();
        self.store().await?.delete(self.key(""), Some(options)).await.map(|_| ()).map_err(|error| error.to_string())
    }

    pub async fn store_compact(&mut self) -> Result<(), String> {
        let mut client = self.store().await?;
        let answer = client.get("nothing", None).await.map_err(|error| error.to_string())?;
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        let options = CompactionOptions::new().with_physical();
        client.compact(revision, Some(options)).await.map(|_| ()).map_err(|error| error.to_string())
    }

    pub async fn store_alarm(&mut self, on: bool) -> Result<(), String> {
        let action = if on { AlarmAction::Activate } else { AlarmAction::Deactivate };
        let mut client = self.store().await?;
        client.alarm(action, AlarmType::Nospace, None).await.map(|_| ()).map_err(|error| error.to_string())
    }

    pub async fn store_replace(&mut self) -> Result<(), String> {
        for index in 0..self.cluster.etcd.members.len() {
            self.cluster.etcd.signal(index, Signal::SIGKILL);
            self.cluster.etcd.stop_member(index).await;
            let data = self.cluster.etcd.directory(index).join("data");
            std::fs::remove_dir_all(&data).map_err(|error| format!("remove {}: {error}", data.display()))?;
        }
        for index in 0..self.cluster.etcd.members.len() {
            self.cluster.etcd.start_member(index).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    pub async fn store_save(&mut self) -> Result<(), String> {
        let file = self.cluster.base.join("etcd.backup");
        let endpoint = self.cluster.etcd.endpoints().remove(0);
        etcdctl(&["--endpoints", &endpoint, "snapshot", "save", &file.to_string_lossy()])?;
        self.backup = Some(file);
        Ok(())
    }

    /// All members of etcd are ended and come back with the data of the backup.
    pub async fn store_restore(&mut self) -> Result<(), String> {
        let file = self.backup.clone().ok_or("nothing was saved")?;
        for index in 0..self.cluster.etcd.members.len() {
            self.cluster.etcd.signal(index, Signal::SIGKILL);
            self.cluster.etcd.stop_member(index).await;
        }
        let members = &self.cluster.etcd.members;
        let all: Vec<String> = members.iter().map(|m| format!("{}={}", m.name, m.peer_url())).collect();
        for (index, member) in members.iter().enumerate() {
            let data = self.cluster.etcd.directory(index).join("data");
            std::fs::remove_dir_all(&data).map_err(|error| format!("remove {}: {error}", data.display()))?;
            restore(&file, &data, &member.name, &member.peer_url(), &all.join(","), &self.cluster.etcd.token())?;
        }
        for index in 0..self.cluster.etcd.members.len() {
            self.cluster.etcd.start_member(index).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

fn restore(file: &Path, data: &Path, name: &str, url: &str, all: &str, token: &str) -> Result<(), String> {
    let (file, data) = (file.to_string_lossy(), data.to_string_lossy());
    etcdctl(&[
        "snapshot",
        "restore",
        &file,
        "--data-dir",
        &data,
        "--name",
        name,
        "--initial-advertise-peer-urls",
        url,
        "--initial-cluster",
        all,
        "--initial-cluster-token",
        token,
    ])
}

fn etcdctl(arguments: &[&str]) -> Result<(), String> {
    let words: Vec<&str> = ["ETCDCTL_API=3", "etcdctl"].iter().chain(arguments).copied().collect();
    hosts::run("env", &words, "").map(|_| ())
}
