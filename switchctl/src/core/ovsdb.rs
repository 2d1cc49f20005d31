//! A bridge of Open vSwitch as its database holds it: what should be there, what is, and the operations that lead from
//! one to the other. Sans-IO; running them twice changes nothing the second time.
//!
//! Source: RFC 7047, section 5; `ovs-vswitchd.conf.db(5)`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

use super::rules::PortNo;

/// The name of the database.
pub const DATABASE: &str = "Open_vSwitch";
/// The largest port number that a bridge has (`OFPP_MAX` of OpenFlow 1.0, which Open vSwitch keeps to).
pub const PORT_MAX: PortNo = PortNo(0xfeff);

/// A bridge as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Its name.
    pub name: String,
    /// Its datapath: `netdev` for the userspace datapath, `system` for the kernel's.
    pub datapath: String,
    /// Its ports. Others that it has are left alone.
    pub ports: Vec<PortSpec>,
    /// Where it listens for controllers besides its Unix socket, for example `ptcp:6653:127.0.0.1`.
    pub listen: Option<String>,
}

/// A port as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// The name of port and interface.
    pub name: String,
    /// Its number.
    pub number: PortNo,
    /// The type of the interface; empty for a network device of the system.
    pub kind: String,
    /// Options of that type. Others that it has are removed.
    pub options: BTreeMap<String, String>,
}

impl PortSpec {
    /// A VXLAN tunnel whose key comes from the rules. Without a remote address that comes from the rules too
    /// (flow-based).
    #[must_use]
    pub fn vxlan(
        name: String,
        number: PortNo,
        remote: Option<IpAddr>,
        local: Option<Ipv4Addr>,
        udp_port: u16,
    ) -> Self {
        let remote = remote.map_or_else(|| "flow".to_owned(), |address| address.to_string());
        let mut options = BTreeMap::from([
            ("remote_ip".to_owned(), remote),
            ("key".to_owned(), "flow".to_owned()),
            ("dst_port".to_owned(), udp_port.to_string()),
        ]);
        options.extend(local.map(|address| ("local_ip".to_owned(), address.to_string())));
        Self { name, number, kind: "vxlan".to_owned(), options }
    }
}

/// Why a bridge cannot be brought to what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OvsdbError {
    /// A port of this name is on another bridge. Remove it there or use another name.
    #[error(
        "port {port} is on bridge {bridge}: remove it there (ovs-vsctl del-port {bridge} {port}) or name another"
    )]
    Elsewhere {
        /// The port.
        port: String,
        /// The bridge that has it.
        bridge: String,
    },
    /// The answer lacks a table or column: not the database of Open vSwitch, or one of a time to come.
    #[error("the database's answer has no usable {0}")]
    Shape(&'static str),
    /// The database refused an operation.
    #[error("the database refused: {0}")]
    Refused(String),
}

/// The operations that read all that [`plan`] compares.
#[must_use]
pub fn read() -> Vec<Value> {
    let select = |table: &str, columns: &[&str]| json!({ "op": "select", "table": table, "where": [], "columns": columns });
    vec![
        select(
            "Bridge",
            &["_uuid", "name", "datapath_type", "fail_mode", "protocols", "ports", "controller"],
        ),
        select("Port", &["_uuid", "name", "interfaces"]),
        select("Interface", &["_uuid", "name", "type", "options", "ofport", "ofport_request", "error"]),
        select("Controller", &["_uuid", "target"]),
        select(DATABASE, &["next_cfg", "cur_cfg"]),
    ]
}

/// What the database has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present {
    bridges: BTreeMap<String, Bridge>,
    ports: BTreeMap<String, (String, BTreeSet<String>)>,
    interfaces: BTreeMap<String, Interface>,
    controllers: BTreeMap<String, String>,
    /// Configurations that were asked for.
    pub next_cfg: i64,
    /// The last of them that the daemon has carried out.
    pub cur_cfg: i64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Bridge {
    datapath: String,
    fail_mode: Option<String>,
    protocols: BTreeSet<String>,
    ports: BTreeSet<String>,
    controllers: BTreeSet<String>,
}

/// An interface that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    kind: String,
    options: BTreeMap<String, String>,
    requested: Option<i64>,
    /// Its port number; `None` until the daemon has opened it.
    pub number: Option<i64>,
    /// Why the daemon cannot open it.
    pub error: Option<String>,
}

impl Present {
    /// Reads the results of the operations of [`read`].
    ///
    /// # Errors
    /// [`OvsdbError::Shape`].
    pub fn parse(results: &[Value]) -> Result<Self, OvsdbError> {
        let [bridges, ports, interfaces, controllers, configuration] = results else {
            return Err(OvsdbError::Shape("results"));
        };
        let mut present = Self::default();
        for row in rows(bridges)? {
            let bridge = Bridge {
                datapath: text(row, "datapath_type")?,
                fail_mode: set(&row["fail_mode"]).pop_first(),
                protocols: set(&row["protocols"]),
                ports: set(&row["ports"]),
                controllers: set(&row["controller"]),
            };
            present.bridges.insert(text(row, "name")?, bridge);
        }
        for row in rows(ports)? {
            present.ports.insert(text(row, "name")?, (uuid(row)?, set(&row["interfaces"])));
        }
        for row in rows(interfaces)? {
            let interface = Interface {
                kind: text(row, "type")?,
                options: map(&row["options"]),
                requested: number(&row["ofport_request"]),
                number: number(&row["ofport"]),
                error: set(&row["error"]).pop_first(),
            };
            present.interfaces.insert(text(row, "name")?, interface);
        }
        for row in rows(controllers)? {
            present.controllers.insert(uuid(row)?, text(row, "target")?);
        }
        let configuration = rows(configuration)?.first().ok_or(OvsdbError::Shape("row of Open_vSwitch"))?;
        present.next_cfg = number(&configuration["next_cfg"]).ok_or(OvsdbError::Shape("next_cfg"))?;
        present.cur_cfg = number(&configuration["cur_cfg"]).ok_or(OvsdbError::Shape("cur_cfg"))?;
        Ok(present)
    }

    /// The fail mode of a bridge; `None` when there is no such bridge.
    #[must_use]
    pub fn fail_mode(&self, bridge: &str) -> Option<FailMode> {
        let mode = self.bridges.get(bridge)?.fail_mode.as_deref();
        Some(if mode == Some("secure") { FailMode::Secure } else { FailMode::Standalone })
    }

    /// An interface by its name.
    #[must_use]
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.get(name)
    }

    /// What is not as it should be although the daemon has carried everything out: for people, with remedies.
    #[must_use]
    pub fn problems(&self, spec: &BridgeSpec) -> Vec<String> {
        let problem = |port: &PortSpec| {
            let (name, wanted) = (&port.name, port.number);
            let interface = self.interfaces.get(name)?;
            if let Some(error) = &interface.error {
                return Some(format!("port {name}: {error}"));
            }
            match interface.number {
                Some(number) if number == i64::from(wanted.0) => None,
                Some(number) if number >= 0 => Some(format!(
                    "port {name} has number {number}, not {wanted}: another port has that; see ovs-vsctl \
                     --columns=name,ofport list interface"
                )),
                _ => Some(format!("port {name} could not be opened; see the log of ovs-vswitchd")),
            }
        };
        spec.ports.iter().filter_map(problem).collect()
    }

    fn bridge_of(&self, port: &str) -> Option<&str> {
        let (id, _) = self.ports.get(port)?;
        let mut bridges = self.bridges.iter();
        bridges.find(|(_, bridge)| bridge.ports.contains(id)).map(|(name, _)| name.as_str())
    }
}

/// What a bridge does without a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailMode {
    /// It keeps its rules.
    Secure,
    /// It becomes a learning switch; this is the default of Open vSwitch.
    Standalone,
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// For people, one line per change.
    pub changes: Vec<String>,
    /// For the database, as one transaction.
    pub operations: Vec<Value>,
}

/// What leads from what is to what should be; empty when there is no difference.
///
/// # Errors
/// [`OvsdbError::Elsewhere`].
pub fn plan(spec: &BridgeSpec, present: &Present) -> Result<Plan, OvsdbError> {
    let mut plan = Plan::default();
    match present.bridges.get(&spec.name) {
        None => plan.add_bridge(spec),
        Some(bridge) => plan.change_bridge(spec, bridge),
    }
    for port in &spec.ports {
        match present.bridge_of(&port.name) {
            None => plan.add_port(&spec.name, port),
            Some(bridge) if bridge != spec.name => {
                return Err(OvsdbError::Elsewhere { port: port.name.clone(), bridge: bridge.to_owned() });
            }
            Some(_) => plan.change_port(port, present.interfaces.get(&port.name)),
        }
    }
    if let Some(listen) = &spec.listen {
        let controllers = present.bridges.get(&spec.name).map(|bridge| &bridge.controllers);
        let mut targets = controllers.into_iter().flatten().filter_map(|id| present.controllers.get(id));
        if !targets.any(|target| target == listen) {
            plan.add_listener(&spec.name, listen);
        }
    }
    if !plan.operations.is_empty() {
        let counted = json!([["next_cfg", "+=", 1]]);
        plan.operations.push(json!({ "op": "mutate", "table": DATABASE, "where": [], "mutations": counted }));
    }
    Ok(plan)
}

const FAIL_MODE: &str = "secure";
const PROTOCOL: &str = "OpenFlow14";

impl Plan {
    fn add_bridge(&mut self, spec: &BridgeSpec) {
        let name = &spec.name;
        self.changes.push(format!("add bridge {name} (datapath {}, fail mode {FAIL_MODE})", spec.datapath));
        self.insert("Interface", "local_interface", json!({ "name": name, "type": "internal" }));
        self.insert(
            "Port",
            "local_port",
            json!({ "name": name, "interfaces": ["named-uuid", "local_interface"] }),
        );
        let row = json!({
            "name": name, "datapath_type": spec.datapath, "fail_mode": FAIL_MODE, "protocols": PROTOCOL,
            "ports": ["named-uuid", "local_port"],
        });
        self.insert("Bridge", "bridge", row);
        let added = json!([["bridges", "insert", ["set", [["named-uuid", "bridge"]]]]]);
        self.operations.push(json!({ "op": "mutate", "table": DATABASE, "where": [], "mutations": added }));
    }

    fn change_bridge(&mut self, spec: &BridgeSpec, bridge: &Bridge) {
        let name = &spec.name;
        if bridge.fail_mode.as_deref() != Some(FAIL_MODE) {
            let was = bridge.fail_mode.as_deref().unwrap_or("standalone by default");
            self.change(format!("set fail mode of bridge {name} to {FAIL_MODE} (was {was})"));
            self.update("Bridge", name, json!({ "fail_mode": FAIL_MODE }));
        }
        if bridge.datapath != spec.datapath {
            self.change(format!(
                "set datapath of bridge {name} to {} (was {:?})",
                spec.datapath, bridge.datapath
            ));
            self.update("Bridge", name, json!({ "datapath_type": spec.datapath }));
        }
        // No list at all means that all versions are spoken.
        if !bridge.protocols.is_empty() && !bridge.protocols.contains(PROTOCOL) {
            self.change(format!("let bridge {name} speak {PROTOCOL} too"));
            self.mutate_bridge(name, json!([["protocols", "insert", ["set", [PROTOCOL]]]]));
        }
    }

    fn add_port(&mut self, bridge: &str, port: &PortSpec) {
        self.change(format!("add port {} as number {}{}", port.name, port.number, described(port)));
        let (interface, own) = (format!("interface_{}", port.number), format!("port_{}", port.number));
        let row = json!({
            "name": port.name, "type": port.kind, "options": map_value(&port.options),
            "ofport_request": port.number.0,
        });
        self.insert("Interface", &interface, row);
        self.insert("Port", &own, json!({ "name": port.name, "interfaces": ["named-uuid", interface] }));
        self.mutate_bridge(bridge, json!([["ports", "insert", ["set", [["named-uuid", own]]]]]));
    }

    fn change_port(&mut self, port: &PortSpec, present: Option<&Interface>) {
        let Some(interface) = present else { return };
        if interface.kind != port.kind || interface.options != port.options {
            self.change(format!("set port {} to{}", port.name, described(port)));
            let row = json!({ "type": port.kind, "options": map_value(&port.options) });
            self.update("Interface", &port.name, row);
        }
        if interface.requested != Some(i64::from(port.number.0)) {
            self.change(format!("set number of port {} to {}", port.name, port.number));
            self.update("Interface", &port.name, json!({ "ofport_request": port.number.0 }));
        }
    }

    fn add_listener(&mut self, bridge: &str, target: &str) {
        self.change(format!("let bridge {bridge} listen at {target}"));
        self.insert("Controller", "listener", json!({ "target": target }));
        self.mutate_bridge(bridge, json!([["controller", "insert", ["set", [["named-uuid", "listener"]]]]]));
    }

    fn change(&mut self, text: String) {
        self.changes.push(text);
    }

    fn insert(&mut self, table: &str, name: &str, row: Value) {
        self.operations.push(json!({ "op": "insert", "table": table, "uuid-name": name, "row": row }));
    }

    fn update(&mut self, table: &str, name: &str, row: Value) {
        let named = json!([["name", "==", name]]);
        self.operations.push(json!({ "op": "update", "table": table, "where": named, "row": row }));
    }

    fn mutate_bridge(&mut self, name: &str, mutations: Value) {
        let named = json!([["name", "==", name]]);
        self.operations
            .push(json!({ "op": "mutate", "table": "Bridge", "where": named, "mutations": mutations }));
    }
}

fn described(port: &PortSpec) -> String {
    let kind = if port.kind.is_empty() { "a device of the system" } else { &port.kind };
    let options: String = port.options.iter().map(|(key, value)| format!(" {key}={value}")).collect();
    format!(" ({kind}{options})")
}

/// The results of a transaction, or the first error in it.
///
/// # Errors
/// [`OvsdbError::Refused`] with the database's words; nothing was changed then.
pub fn results(answer: Value) -> Result<Vec<Value>, OvsdbError> {
    let Value::Array(results) = answer else { return Err(OvsdbError::Shape("results")) };
    match results.iter().find(|result| result.get("error").is_some_and(|error| !error.is_null())) {
        None => Ok(results),
        Some(result) => {
            let words = |key: &str| result[key].as_str().unwrap_or_default().to_owned();
            Err(OvsdbError::Refused(format!("{}: {}", words("error"), words("details"))))
        }
    }
}

fn rows(result: &Value) -> Result<&Vec<Value>, OvsdbError> {
    result["rows"].as_array().ok_or(OvsdbError::Shape("rows"))
}

fn text(row: &Value, column: &'static str) -> Result<String, OvsdbError> {
    row[column].as_str().map(str::to_owned).ok_or(OvsdbError::Shape(column))
}

fn uuid(row: &Value) -> Result<String, OvsdbError> {
    row["_uuid"][1].as_str().map(str::to_owned).ok_or(OvsdbError::Shape("_uuid"))
}

/// A set of strings or of row ids (RFC 7047, section 5.1: one element may stand alone).
fn set(value: &Value) -> BTreeSet<String> {
    let element = |value: &Value| value.as_str().or_else(|| value[1].as_str()).map(str::to_owned);
    match (value[0].as_str(), &value[1]) {
        (Some("set"), Value::Array(elements)) => elements.iter().filter_map(element).collect(),
        _ => element(value).into_iter().collect(),
    }
}

fn number(value: &Value) -> Option<i64> {
    value.as_i64()
}

fn map(value: &Value) -> BTreeMap<String, String> {
    let pairs = value[1].as_array().into_iter().flatten();
    pairs.filter_map(|pair| Some((pair[0].as_str()?.to_owned(), pair[1].as_str()?.to_owned()))).collect()
}

fn map_value(map: &BTreeMap<String, String>) -> Value {
    json!(["map", map.iter().map(|(key, value)| json!([key, value])).collect::<Vec<_>>()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> BridgeSpec {
        let port = |name: &str, number| PortSpec {
            name: name.into(),
            number: PortNo(number),
            kind: String::new(),
            options: BTreeMap::new(),
        };
        BridgeSpec {
            name: "br0".into(),
            datapath: "netdev".into(),
            ports: vec![port("in0", 1), PortSpec::vxlan("vx".into(), PortNo(1300), None, None, 4789)],
            listen: None,
        }
    }

    /// As a database answers: no bridge but one of somebody else's with port `other0`.
    fn present(bridge: Option<Value>, interfaces: Value) -> Present {
        let mut bridges = vec![json!({
            "_uuid": ["uuid", "b9"], "name": "br9", "datapath_type": "", "fail_mode": ["set", []],
            "protocols": ["set", []], "ports": ["uuid", "p9"], "controller": ["set", []],
        })];
        bridges.extend(bridge);
        let ports = json!([
            { "_uuid": ["uuid", "p9"], "name": "other0", "interfaces": ["uuid", "i9"] },
            { "_uuid": ["uuid", "p1"], "name": "in0", "interfaces": ["uuid", "i1"] },
            { "_uuid": ["uuid", "p2"], "name": "vx", "interfaces": ["uuid", "i2"] },
        ]);
        let rows = [json!(bridges), ports, interfaces, json!([]), json!([{ "next_cfg": 4, "cur_cfg": 3 }])];
        Present::parse(&rows.map(|rows| json!({ "rows": rows }))).unwrap()
    }

    fn bridge(fail_mode: Value) -> Value {
        json!({
            "_uuid": ["uuid", "b0"], "name": "br0", "datapath_type": "netdev", "fail_mode": fail_mode,
            "protocols": "OpenFlow14", "ports": ["set", [["uuid", "p1"], ["uuid", "p2"]]], "controller": ["set", []],
        })
    }

    fn interfaces(udp_port: &str) -> Value {
        let options = json!([["remote_ip", "flow"], ["key", "flow"], ["dst_port", udp_port]]);
        json!([
            { "name": "in0", "type": "", "options": ["map", []], "ofport": 1, "ofport_request": 1, "error": ["set", []] },
            { "name": "vx", "type": "vxlan", "options": ["map", options], "ofport": ["set", []], "ofport_request": 1300,
              "error": "no such thing" },
        ])
    }

    #[test]
    fn what_is_as_it_should_be_is_left_alone() {
        let present = present(Some(bridge(json!("secure"))), interfaces("4789"));
        assert_eq!(plan(&spec(), &present), Ok(Plan::default()));
        assert_eq!(present.fail_mode("br0"), Some(FailMode::Secure));
        assert_eq!(present.interface("vx").unwrap().error.as_deref(), Some("no such thing"));
    }

    #[test]
    fn the_default_fail_mode_is_standalone_and_is_changed() {
        let present = present(Some(bridge(json!(["set", []]))), interfaces("4789"));
        assert_eq!(present.fail_mode("br0"), Some(FailMode::Standalone));
        assert_eq!(present.fail_mode("br1"), None);
        let plan = plan(&spec(), &present).unwrap();
        assert_eq!(plan.changes, ["set fail mode of bridge br0 to secure (was standalone by default)"]);
        assert_eq!(plan.operations.len(), 2, "the change and the count of configurations");
    }

    #[test]
    fn a_tunnel_with_other_options_is_changed_in_place() {
        let present = present(Some(bridge(json!("secure"))), interfaces("8472"));
        let plan = plan(&spec(), &present).unwrap();
        assert_eq!(plan.changes, ["set port vx to (vxlan dst_port=4789 key=flow remote_ip=flow)"]);
    }

    #[test]
    fn a_port_of_another_bridge_is_not_taken_away() {
        let mut spec = spec();
        spec.ports[0].name = "other0".into();
        let present = present(Some(bridge(json!("secure"))), interfaces("4789"));
        let error = plan(&spec, &present).unwrap_err();
        assert_eq!(error, OvsdbError::Elsewhere { port: "other0".into(), bridge: "br9".into() });
    }

    #[test]
    fn a_refused_operation_is_told_in_the_words_of_the_database() {
        let answer = json!([{}, { "error": "constraint violation", "details": "name twice" }, null]);
        assert_eq!(results(answer), Err(OvsdbError::Refused("constraint violation: name twice".into())));
        assert!(results(json!({})).is_err());
    }
}
