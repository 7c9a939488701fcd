//! The steps of a scenario, done.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pgvigil::demo::processes;
use pgvigil::demo::sql::{self, Session};
use pgvigil::demo::workload::Workload;

use super::hosts::{self, Rule};
use super::scenario::{Condition, FileFault, Port, SqlHow, Step, Way};
use super::stage::{Before, Cast, FILLER, LOOK, Stage, Target};

/// A step that is an order (start, stop, ask) and not a fault.
const ORDER: Duration = Duration::from_secs(60);

/// One scenario under way.
pub struct Play<'a> {
    pub stage: &'a mut Stage,
    pub workload: &'a Workload,
    pub cast: Cast,
    pub before: Before,
    /// When the first fault came.
    pub fault: Option<Instant>,
    /// Waits that were met, with how long after the first fault.
    pub met: Vec<(String, Duration)>,
    kept: Vec<Session>,
    background: tokio::task::JoinSet<()>,
    /// Killed when dropped.
    spawned: Vec<tokio::process::Child>,
    flood: Vec<tokio::net::TcpStream>,
}

impl<'a> Play<'a> {
    pub fn new(stage: &'a mut Stage, workload: &'a Workload, cast: Cast, before: Before) -> Play<'a> {
        let (kept, background) = (Vec::new(), tokio::task::JoinSet::new());
        let (spawned, flood) = (Vec::new(), Vec::new());
        Play { stage, workload, cast, before, fault: None, met: Vec::new(), kept, background, spawned, flood }
    }

    /// The error says which step could not be done, or what did not come.
    pub async fn step(&mut self, text: &str, step: &Step) -> Result<(), String> {
        match step {
            Step::Wait { until, within } => {
                let begun = self.fault.unwrap_or_else(Instant::now);
                self.wait(until, *within).await.map_err(|why| format!("`{text}`: {why}"))?;
                self.met.push((text.trim_start_matches("wait ").to_owned(), begun.elapsed()));
                Ok(())
            }
            Step::Hold { while_, for_ } => {
                self.hold(while_.as_ref(), *for_).await.map_err(|why| format!("`{text}`: {why}"))
            }
            Step::Repeat { times, steps } => {
                for _ in 0..*times {
                    for step in steps {
                        Box::pin(self.step(text, step)).await?;
                    }
                }
                Ok(())
            }
            fault => {
                self.fault.get_or_insert_with(Instant::now);
                self.fault_or_order(fault).await.map_err(|why| format!("`{text}`: {why}"))
            }
        }
    }

    async fn fault_or_order(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Signal { signal, who, what } => self.signal(*signal, who, what.as_deref()).await,
            Step::PowerOff(who) => self.power_off(who).await,
            Step::Start(who) => self.start(who).await,
            Step::Leave(who) => {
                for member in self.members(who).await? {
                    self.stage.cluster.stop_member(member).await.map_err(|error| error.to_string())?;
                }
                Ok(())
            }
            Step::Freeze(who) => self.each_host(who, |hosts, name| hosts.freeze(name, true)).await,
            Step::Thaw(who) => self.each_host(who, |hosts, name| hosts.freeze(name, false)).await,
            Step::Cut { who, from, way, port } => self.cut(who, from.as_deref(), *way, *port).await,
            Step::Lose { who, percent } => {
                let rule = Rule::Loss { percent: *percent };
                self.each_host(who, |hosts, name| hosts.add(name, [rule.clone()])).await
            }
            Step::LongerThan { who, bytes } => {
                let rule = Rule::LongerThan { bytes: *bytes };
                self.each_host(who, |hosts, name| hosts.add(name, [rule.clone()])).await
            }
            Step::Rate { who, kbytes } => {
                let rule = Rule::Rate { kbytes: *kbytes };
                self.each_host(who, |hosts, name| hosts.add(name, [rule.clone()])).await
            }
            Step::Heal(who) if who == "all" => self.stage.hosts.clear_all(),
            Step::Heal(who) => self.each_host(who, |hosts, name| hosts.clear(name)).await,
            Step::LimitProcesses { who, more } => {
                self.each_host(who, |hosts, name| hosts.limit_processes(name, Some(*more))).await
            }
            Step::FreezeDisk(who) => {
                for member in self.members(who).await? {
                    self.stage.disks[member].freeze().await.map_err(|error| error.to_string())?;
                }
                Ok(())
            }
            Step::ThawDisk(who) => {
                self.members(who).await?.into_iter().for_each(|member| self.stage.disks[member].thaw());
                Ok(())
            }
            Step::FillDisk(who) => self.fill(who).await,
            Step::EmptyDisk(who) => {
                for member in self.members(who).await? {
                    let file = self.stage.disks[member].mounted.join(FILLER);
                    std::fs::remove_file(&file).map_err(|error| format!("remove {}: {error}", file.display()))?;
                }
                Ok(())
            }
            Step::File { how, who, path } => self.file(*how, who, path).await,
            Step::Write { who, path, text } => {
                for member in self.members(who).await? {
                    let file = self.path(member, path)?;
                    let owner = self.stage.cluster.members[member].directory.join("pg");
                    let written = std::fs::write(&file, format!("{text}\n")).and_then(|()| {
                        use std::os::unix::fs::MetadataExt;
                        let owner = std::fs::metadata(owner)?;
                        std::os::unix::fs::chown(&file, Some(owner.uid()), Some(owner.gid()))
                    });
                    written.map_err(|error| format!("write {}: {error}", file.display()))?;
                }
                Ok(())
            }
            Step::Sql { who, statement, how } => self.sql(who, statement, *how).await,
            Step::Reinit(who) => {
                let name = self.name(Some(who)).await?;
                let body = serde_json::json!({ "member": name });
                let answer = self.stage.cluster.client().post("/v1/reinit", &body).await;
                answer.and_then(pgvigil::client::Answer::success).map(|_| ()).map_err(|error| error.to_string())
            }
            Step::Promote(who) => self.promote(who).await,
            Step::Switchover { to } => {
                let to = self.name(to.as_deref()).await?;
                self.stage.cluster.switchover(to.as_deref(), ORDER).await.map(|_| ()).map_err(|error| error.to_string())
            }
            Step::Refused { to, text } => {
                let to = self.name(to.as_deref()).await?;
                match self.stage.cluster.switchover(to.as_deref(), ORDER).await {
                    Ok(said) => Err(format!("it was not refused: {said}")),
                    Err(error) if error.to_string().contains(text) => Ok(()),
                    Err(error) => Err(format!("it was refused in other words: {error}")),
                }
            }
            Step::EtcdDelete(key) => self.stage.store_delete(key).await,
            Step::EtcdPut { key, text } => self.stage.store_put(key, text).await,
            Step::EtcdWipe => self.stage.store_wipe().await,
            Step::EtcdSave => self.stage.store_save().await,
            Step::EtcdRestore => self.stage.store_restore().await,
            Step::EtcdCompact => self.stage.store_compact().await,
            Step::EtcdFull => self.stage.store_alarm(true).await,
            Step::EtcdRoom => self.stage.store_alarm(false).await,
            Step::EtcdReplace => self.stage.store_replace().await,
            Step::Flood { who, port, count } => self.flood(who, *port, *count).await,
            Step::Spawn { who, command } => {
                for member in self.members(who).await? {
                    let child = self.stage.command(member, command).spawn().map_err(|error| error.to_string())?;
                    self.spawned.push(child);
                }
                Ok(())
            }
            Step::Shell { who, command, fails } => {
                for member in self.members(who).await? {
                    self.stage.shell(member, command, fails.as_deref()).await?;
                }
                Ok(())
            }
            Step::Save(who) => {
                for member in self.members(who).await? {
                    self.stage
                        .shell(
                            member,
                            "rm -rf saved && mkdir saved && cp -a pg/data saved/ && cp -a state saved/",
                            None,
                        )
                        .await?;
                }
                Ok(())
            }
            Step::Restore(who) => {
                for member in self.members(who).await? {
                    // The same directories with the old content, as a snapshot of the disk brings them.
                    let back = "mkdir -p pg/data && find pg/data state -mindepth 1 -delete && cp -a saved/data/. pg/data/ && \
                                cp -a saved/state/. state/ && chown --reference=saved/data pg/data && chmod 700 pg/data";
                    self.stage.shell(member, back, None).await?;
                }
                Ok(())
            }
            Step::Unmount(who) => {
                for member in self.members(who).await? {
                    let mounted = self.stage.disks[member].mounted.display().to_string();
                    hosts::run("umount", &[&mounted], "")?;
                }
                Ok(())
            }
            Step::Mount(who) => {
                for member in self.members(who).await? {
                    self.stage.mount(member)?;
                }
                Ok(())
            }
            Step::Wait { .. } | Step::Hold { .. } | Step::Repeat { .. } => Ok(()),
        }
    }

    // === Who ===

    pub async fn targets(&self, who: &str) -> Result<Vec<Target>, String> {
        let all = 0..self.stage.cluster.members.len();
        let member = |index: usize| vec![Target::Member(index)];
        let store = |index: usize| vec![Target::Store(index)];
        Ok(match who {
            "primary" => member(self.cast.primary),
            "standby" => member(self.cast.standby),
            "other" => member(self.cast.other.ok_or("there is no third member")?),
            "standbys" => all.filter(|index| *index != self.cast.primary).map(Target::Member).collect(),
            "all" => all.map(Target::Member).collect(),
            "everybody" => all.map(Target::Member).chain((0..3).map(Target::Store)).collect(),
            "leader" => member(self.stage.cluster.primary().await.ok_or("nobody leads now")?),
            "etcd" => (0..3).map(Target::Store).collect(),
            "etcd-leader" => store(self.stage.store_leader().await?),
            "etcd-follower" => store((self.stage.store_leader().await? + 1) % 3),
            "etcd-majority" => {
                let leader = self.stage.store_leader().await?;
                vec![Target::Store(leader), Target::Store((leader + 1) % 3)]
            }
            "clients" => vec![Target::Clients],
            name => match name.strip_prefix("etcd-").and_then(|number| number.parse::<usize>().ok()) {
                Some(number) => store(number - 1),
                None => member(self.stage.cluster.index(name).ok_or_else(|| format!("`{name}` is no member"))?),
            },
        })
    }

    pub async fn members(&self, who: &str) -> Result<Vec<usize>, String> {
        let targets = self.targets(who).await?.into_iter().map(|target| match target {
            Target::Member(index) => Ok(index),
            Target::Store(_) | Target::Clients => Err(format!("`{who}` is no member")),
        });
        targets.collect()
    }

    async fn name(&self, who: Option<&str>) -> Result<Option<String>, String> {
        let Some(who) = who else { return Ok(None) };
        let member = *self.members(who).await?.first().ok_or("nobody")?;
        Ok(Some(self.stage.cluster.members[member].name.clone()))
    }

    async fn each_host(
        &mut self,
        who: &str,
        mut act: impl FnMut(&mut hosts::Hosts, &str) -> Result<(), String>,
    ) -> Result<(), String> {
        for target in self.targets(who).await? {
            let name = self.stage.host_of(target).ok_or("clients have no host of their own")?;
            act(&mut self.stage.hosts, &name)?;
        }
        Ok(())
    }

    // === Processes ===

    async fn signal(&mut self, signal: Signal, who: &str, what: Option<&str>) -> Result<(), String> {
        for target in self.targets(who).await? {
            let pids = match (target, what) {
                (Target::Store(index), None) => self.stage.cluster.etcd.pid(index).into_iter().collect(),
                (Target::Member(index), Some(what)) => self.stage.pids(index, what),
                (Target::Member(_), None) => return Err("say which process".to_owned()),
                (Target::Store(_) | Target::Clients, _) => return Err(format!("`{who}` has no such process")),
            };
            if pids.is_empty() {
                return Err(format!("{who} runs no {}", what.unwrap_or("etcd")));
            }
            pids.iter().for_each(|pid| processes::send(*pid, signal));
        }
        Ok(())
    }

    /// Frozen first, so that nothing of it notices the death of the rest.
    async fn power_off(&mut self, who: &str) -> Result<(), String> {
        let targets = self.targets(who).await?;
        for frozen in [true, false] {
            for target in &targets {
                let name = self.stage.host_of(*target).ok_or("clients have no power")?;
                self.stage.hosts.freeze(&name, frozen)?;
                if frozen {
                    self.stage.hosts.processes(&name).iter().for_each(|pid| processes::send(*pid, Signal::SIGKILL));
                }
            }
        }
        let begun = Instant::now();
        for target in &targets {
            let name = self.stage.host_of(*target).unwrap_or_default();
            if let Target::Member(index) = target {
                self.stage.cluster.agent_gone(*index, ORDER).await.map_err(|error| error.to_string())?;
            }
            while !self.stage.hosts.processes(&name).is_empty() && begun.elapsed() < ORDER {
                tokio::time::sleep(LOOK).await;
            }
        }
        Ok(())
    }

    async fn start(&mut self, who: &str) -> Result<(), String> {
        for target in self.targets(who).await? {
            match target {
                Target::Member(index) => {
                    self.stage
                        .cluster
                        .agent_gone(index, Duration::from_secs(5))
                        .await
                        .map_err(|error| error.to_string())?;
                    self.stage.cluster.start_agent(index)
                }
                Target::Store(index) => {
                    self.stage.cluster.etcd.stop_member(index).await;
                    self.stage.cluster.etcd.start_member(index)
                }
                Target::Clients => Ok(()),
            }
            .map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    // === Network ===

    async fn cut(&mut self, who: &str, from: Option<&str>, way: Way, port: Option<Port>) -> Result<(), String> {
        let ways: &[bool] = match way {
            Way::Both => &[true, false],
            Way::Incoming => &[true],
            Way::Outgoing => &[false],
        };
        for target in self.targets(who).await? {
            let name = self.stage.host_of(target).ok_or("clients have no host of their own")?;
            let peers = match from {
                None => Vec::new(),
                Some(from) => self.targets(from).await?.into_iter().filter(|peer| *peer != target).collect(),
            };
            let mut rules = Vec::new();
            for incoming in ways {
                if peers.contains(&Target::Clients) {
                    rules.push(Rule::Clients { incoming: *incoming });
                    continue;
                }
                let addresses: Vec<_> =
                    peers.iter().filter_map(|peer| self.stage.hosts.address(&self.stage.host_of(*peer)?)).collect();
                for port in self.ports(target, &peers, port) {
                    rules.push(Rule::Drop { peers: addresses.clone(), incoming: *incoming, port });
                }
            }
            self.stage.hosts.add(&name, rules)?;
        }
        Ok(())
    }

    /// `None`: all of them.
    fn ports(&self, target: Target, peers: &[Target], port: Option<Port>) -> Vec<Option<u16>> {
        let Some(port) = port else { return vec![None] };
        let members = std::iter::once(&target).chain(peers).filter_map(|target| match target {
            Target::Member(index) => Some(&self.stage.cluster.members[*index]),
            Target::Store(_) | Target::Clients => None,
        });
        let number = |member: &pgvigil::demo::Member| match port {
            Port::Postgres => member.port,
            Port::Agents => member.api_port,
        };
        members.map(|member| Some(number(member))).collect()
    }

    // === Disks and files ===

    async fn fill(&mut self, who: &str) -> Result<(), String> {
        for member in self.members(who).await? {
            let file = self.stage.disks[member].mounted.join(FILLER).display().to_string();
            // Blocks are reserved, not written: the last byte is gone in an instant.
            let free =
                hosts::run("stat", &["-f", "-c", "%a %S", &self.stage.disks[member].mounted.to_string_lossy()], "")?;
            let mut words = free.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
            let bytes = words.next().unwrap_or(0) * words.next().unwrap_or(0);
            let _ = hosts::run("fallocate", &["-l", &bytes.max(4096).to_string(), &file], "");
            // What the file's own bookkeeping left.
            let _ = hosts::run("sh", &["-c", &format!("cat /dev/zero >>{file}")], "");
        }
        Ok(())
    }

    fn path(&self, member: usize, path: &str) -> Result<PathBuf, String> {
        let member = &self.stage.cluster.members[member];
        let file = match path.strip_prefix("data") {
            Some(rest) => PathBuf::from(format!("{}{rest}", member.data_dir().display())),
            None => member.directory.join(path),
        };
        let Some(start) = file.to_string_lossy().strip_suffix('*').map(str::to_owned) else { return Ok(file) };
        let entries = file.parent().and_then(|parent| std::fs::read_dir(parent).ok()).into_iter().flatten().flatten();
        let newest = entries
            .map(|entry| entry.path())
            .filter(|entry| entry.is_file() && entry.to_string_lossy().starts_with(&start))
            .max_by_key(|entry| std::fs::metadata(entry).and_then(|m| m.modified()).ok());
        newest.ok_or_else(|| format!("there is no {start}*"))
    }

    async fn file(&mut self, how: FileFault, who: &str, path: &str) -> Result<(), String> {
        for member in self.members(who).await? {
            let file = self.path(member, path)?;
            let done = match how {
                FileFault::Remove if file.is_dir() => std::fs::remove_dir_all(&file),
                FileFault::Remove => std::fs::remove_file(&file),
                FileFault::Truncate => std::fs::File::options().write(true).open(&file).and_then(|f| f.set_len(4096)),
                FileFault::Garble => {
                    use std::os::unix::fs::FileExt;
                    std::fs::File::options().write(true).open(&file).and_then(|f| f.write_all_at(&[0xa5; 1024], 0))
                }
            };
            done.map_err(|error| format!("{}: {error}", file.display()))?;
        }
        Ok(())
    }

    async fn flood(&mut self, who: &str, port: Port, count: usize) -> Result<(), String> {
        for member in self.members(who).await? {
            let member = &self.stage.cluster.members[member];
            let published = self.stage.hosts.published(&member.name).ok_or("no published address")?;
            let at = (published, if port == Port::Postgres { member.port } else { member.api_port });
            for _ in 0..count {
                // Whoever is full refuses; that is what is looked at.
                let connect = tokio::net::TcpStream::connect(at);
                if let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_millis(200), connect).await {
                    self.flood.push(stream);
                }
            }
        }
        Ok(())
    }

    async fn promote(&mut self, who: &str) -> Result<(), String> {
        for member in self.members(who).await? {
            let session = self.stage.superuser(member).await?;
            let asked = session.execute("SELECT pg_promote(false)", &[]).await;
            asked.map_err(|error| sql::sentence(&error))?;
        }
        Ok(())
    }

    async fn sql(&mut self, who: &str, statement: &str, how: SqlHow) -> Result<(), String> {
        for member in self.members(who).await? {
            let session = match (self.stage.superuser(member).await, how) {
                (Ok(session), _) => session,
                (Err(_), SqlHow::Try | SqlHow::Background) => continue,
                (Err(why), SqlHow::Run | SqlHow::Keep) => return Err(why),
            };
            if how == SqlHow::Background {
                let statement = statement.to_owned();
                self.background.spawn(async move {
                    let _ = session.batch_execute(&statement).await;
                });
                continue;
            }
            let done = session.batch_execute(statement).await.map_err(|error| sql::sentence(&error));
            if how != SqlHow::Try {
                done?;
            }
            if how == SqlHow::Keep {
                self.kept.push(session);
            }
        }
        Ok(())
    }
}

// === Conditions ===

impl Play<'_> {
    async fn wait(&mut self, until: &Condition, within: Duration) -> Result<(), String> {
        let begun = Instant::now();
        if matches!(until, Condition::Writes) {
            let written = self.workload.acknowledged_after(begun, within).await;
            return written.then_some(()).ok_or_else(|| format!("no write was acknowledged within {within:?}"));
        }
        let mut quiet = (self.workload.acknowledged(), begun);
        loop {
            if matches!(until, Condition::NoWrites) {
                let now = self.workload.acknowledged();
                if now != quiet.0 {
                    quiet = (now, Instant::now());
                }
                if quiet.1.elapsed() > Duration::from_secs(1) {
                    return Ok(());
                }
            } else if self.is(until).await? {
                return Ok(());
            }
            if begun.elapsed() > within {
                return Err(format!("not within {within:?}; {}", self.brief().await));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn hold(&mut self, while_: Option<&Condition>, for_: Duration) -> Result<(), String> {
        let begun = Instant::now();
        let acknowledged = self.workload.acknowledged();
        while let Some(left) = for_.checked_sub(begun.elapsed()) {
            match while_ {
                // How long the fault lasts.
                None => tokio::time::sleep(left).await,
                Some(Condition::Writes) => {
                    if !self.workload.acknowledged_after(Instant::now(), Duration::from_secs(3)).await {
                        return Err(format!("no write was acknowledged for 3 s; {}", self.brief().await));
                    }
                    tokio::time::sleep(LOOK).await;
                }
                Some(Condition::NoWrites) => {
                    if self.workload.acknowledged() > acknowledged {
                        return Err(format!("a write was acknowledged after {:?}", begun.elapsed()));
                    }
                    tokio::time::sleep(LOOK).await;
                }
                // Whoever does not answer says nothing against it.
                Some(Condition::Same) => {
                    if let Some(leader) = self.stage.cluster.primary().await.filter(|now| *now != self.cast.primary) {
                        let name = &self.stage.cluster.members[leader].name;
                        return Err(format!("{name} leads after {:?}", begun.elapsed()));
                    }
                    tokio::time::sleep(LOOK).await;
                }
                Some(other) => {
                    if !self.is(other).await? {
                        return Err(format!("no longer true after {:?}; {}", begun.elapsed(), self.brief().await));
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
        Ok(())
    }

    async fn is(&self, condition: &Condition) -> Result<bool, String> {
        let looks = || self.stage.cluster.look();
        let leads = async |right: &dyn Fn(usize) -> bool| {
            looks().await.iter().enumerate().any(|(index, look)| look.is_primary() && right(index))
        };
        Ok(match condition {
            Condition::Changed => leads(&|index| index != self.cast.primary).await,
            Condition::Same => leads(&|index| index == self.cast.primary).await,
            Condition::Primary => leads(&|_| true).await,
            Condition::Leaderless => !leads(&|_| true).await,
            Condition::Healthy => pgvigil::demo::is_healthy(&looks().await),
            Condition::Streams { who } => {
                let members = self.members(who).await?;
                let looks = looks().await;
                members.iter().all(|member| looks[*member].is_streaming())
            }
            Condition::Down { who } => {
                let members = self.members(who).await?;
                members.iter().all(|member| self.stage.cluster.members[*member].postmaster().is_none())
            }
            Condition::Gone { who, what } => {
                let members = self.members(who).await?;
                members.iter().all(|member| self.stage.pids(*member, what).is_empty())
            }
            Condition::Says { who, text } => {
                let mut said = true;
                for member in self.members(who).await? {
                    said &= self.stage.said(member, &self.before).contains(text)
                        || self.stage.status(member).await.to_string().contains(text);
                }
                said
            }
            Condition::Writes | Condition::NoWrites => true,
        })
    }

    /// What the agents say, in a line.
    async fn brief(&self) -> String {
        let looks = self.stage.cluster.look().await;
        let mut words = Vec::new();
        for (index, look) in looks.iter().enumerate() {
            let name = &self.stage.cluster.members[index].name;
            let status = self.stage.status(index).await;
            let reason = status["decision"]["reason"].as_str().unwrap_or("no answer").to_owned();
            words.push(format!("{name} ({} {}): {reason}", look.text("role"), look.text("state")));
        }
        words.join("; ")
    }

    /// Ends what was kept open or running.
    pub async fn end(mut self) -> Vec<(String, Duration)> {
        for child in &mut self.spawned {
            if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
                // Its whole process group: a shell's children too.
                processes::send(-pid, Signal::SIGKILL);
            }
            let _ = child.wait().await;
        }
        self.met
    }
}
