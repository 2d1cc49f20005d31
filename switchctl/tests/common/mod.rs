//! A small plan and its rules, and how to wait for a session: what tests of both switches share.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flow::{Epoch, GroupId, ServiceId, SiteId, WorkerId};
use switchctl::core::rules::RuleSet;
use switchctl::{GroupPlan, Ports, SitePlan, SwitchEvent, compile};
use tokio::sync::mpsc;

pub(crate) const OWN: SiteId = SiteId(1);
pub(crate) const PEER: SiteId = SiteId(2);

pub(crate) fn group() -> GroupId {
    GroupId { service: ServiceId::new(1).unwrap(), prefix: "100.64.0.0/24".parse().unwrap() }
}

pub(crate) fn plan(steer: SiteId, local: Option<u16>) -> SitePlan {
    let entry = GroupPlan { epoch: Epoch(1), steer, local: local.map(WorkerId) };
    SitePlan {
        site: OWN,
        ports: Ports::conventional([PEER], [WorkerId(0), WorkerId(1)]),
        services: BTreeMap::new(),
        groups: BTreeMap::from([(group(), entry)]),
        relayed: BTreeMap::new(),
    }
}

pub(crate) fn rules(steer: SiteId, local: Option<u16>) -> Arc<RuleSet> {
    Arc::new(compile(&plan(steer, local)))
}

pub(crate) async fn next(events: &mut mpsc::Receiver<SwitchEvent>) -> SwitchEvent {
    tokio::time::timeout(Duration::from_secs(30), events.recv()).await.unwrap().unwrap()
}

pub(crate) async fn in_force(events: &mut mpsc::Receiver<SwitchEvent>, tag: u64) -> usize {
    loop {
        match next(events).await {
            SwitchEvent::InForce { tag: told, changes } if told == tag => return changes,
            SwitchEvent::Error(error) => panic!("{error}"),
            SwitchEvent::Connected { .. }
            | SwitchEvent::Disconnected
            | SwitchEvent::InForce { .. }
            | SwitchEvent::Silent(_)
            | SwitchEvent::Answering => {}
        }
    }
}
