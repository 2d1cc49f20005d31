//! The services of the deployment, and what each promises: one keeps the order of packets in moves, one does not. Each has groups of
//! clients at every site.

use flow::Prefix;
use serde_json::{Value, json};

/// A service as it is put.
#[derive(Debug)]
pub(crate) struct Service {
    id: u8,
    name: &'static str,
    /// Four groups of the world at each site.
    clients: [&'static str; 3],
    pool: &'static str,
    ports_per_subscriber: u16,
    pub(crate) group_len: u8,
    /// Packets of one flow may pass one another while their group moves between sites.
    pub(crate) relaxed: bool,
    /// How long a flow of UDP is kept that is idle. Flows of the world never are for so long.
    udp_s: u32,
}

/// They differ in all that a service can be given. A /24 of clients is one group of the first and two of the second.
pub(crate) const SERVICES: [Service; 2] = [
    Service {
        id: 1,
        name: "strict",
        clients: ["100.64.0.0/22", "100.64.8.0/22", "100.64.16.0/22"],
        pool: "198.51.100.0/27",
        ports_per_subscriber: 504,
        group_len: 24,
        relaxed: false,
        udp_s: 300,
    },
    Service {
        id: 2,
        name: "relaxed",
        clients: ["100.64.4.0/22", "100.64.12.0/22", "100.64.20.0/22"],
        pool: "198.51.100.32/27",
        ports_per_subscriber: 252,
        group_len: 25,
        relaxed: true,
        udp_s: 120,
    },
];

impl Service {
    pub(crate) fn path(&self) -> String {
        format!("/v1/services/{}", self.name)
    }

    pub(crate) fn body(&self) -> Value {
        json!({
            "id": self.id,
            "nat": {
                "clients": self.clients,
                "pool": [self.pool],
                "ports_per_subscriber": self.ports_per_subscriber,
                "port_key": 7_654_321 + u32::from(self.id),
            },
            "timeouts": { "udp_s": self.udp_s },
            "ordering": self.ordering(),
            "group_len": self.group_len,
        })
    }

    /// As the API has it.
    pub(crate) fn ordering(&self) -> &'static str {
        if self.relaxed { "relaxed" } else { "strict" }
    }

    fn has(&self, clients: Prefix) -> bool {
        self.clients.iter().any(|own| own.parse::<Prefix>().is_ok_and(|own| own.covers(&clients)))
    }
}

/// Whose clients these are.
pub(crate) fn service_of(clients: Prefix) -> &'static Service {
    SERVICES.iter().find(|service| service.has(clients)).unwrap_or(&SERVICES[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_site_has_groups_of_both_services() {
        let relaxed: Vec<u8> =
            (0..24).filter(|nth| service_of(format!("100.64.{nth}.0/24").parse().unwrap()).relaxed).collect();
        assert_eq!(relaxed, [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]);
    }
}
