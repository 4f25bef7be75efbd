//! The configuration as a user meets it: good examples pass, and what is wrong with a broken one
//! is said at the right place in the right words.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use corelane::config::{
    Backend, Checked, Config, Fallback, Host, Idle, Inputs, Io, Kind, Main, Origin, Override,
    Policy, Purpose, Section, find, keys, load,
};
use corelane::env::Env;
use proptest::prelude::*;

fn host(cpus: impl IntoIterator<Item = usize>) -> Host {
    Host {
        cpus: cpus.into_iter().collect(),
        files_max: None,
    }
}

fn inputs(text: &str) -> Inputs {
    Inputs {
        purpose: Purpose::Serve,
        main: Main::Text {
            name: "c.toml".into(),
            text: text.into(),
        },
        overrides: Vec::new(),
        env: Env::default(),
        host: host(0..4),
    }
}

fn env(pairs: &[(&str, &str)]) -> Env {
    Env::of(
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    )
}

fn set(path: &str, text: &str) -> Override {
    let key = find(path).unwrap_or_else(|| panic!("no key {path}"));
    Override {
        flag: format!("--set {path}"),
        key,
        text: text.into(),
    }
}

fn lines(checked: &Checked) -> Vec<String> {
    checked.problems.iter().map(ToString::to_string).collect()
}

fn good(inputs: &Inputs) -> Config {
    let checked = load(inputs);
    let lines = lines(&checked);
    checked.config.unwrap_or_else(|| panic!("{lines:#?}"))
}

/// A route and its instance, so that a case is about one thing only. Six lines.
const ROUTE: &str = r#"[[route]]
listen = "a/r/g"
target = "a/b/g"
[[instance]]
endpoint = "a/b/g"
address = "127.0.0.1:9/1/a/b/g"
"#;

/// Text after [`ROUTE`], so its first line is line 7, and everything that must be said.
const AFTER_ROUTE: &[(&str, &[&str])] = &[
    (
        "[server]\nport = 70000\n",
        &["c.toml:8:8: port is 70000, outside 0 to 65535 (port); write 65535"],
    ),
    (
        "[server]\nport = -1\n",
        &["c.toml:8:8: port is -1, outside 0 to 65535 (port); write 0"],
    ),
    (
        "[server]\nport = \"8000\"\n",
        &["c.toml:8:8: port must be a number, not a string; write port = 8000 without quotes"],
    ),
    (
        "[server]\nport = 80.5\n",
        &["c.toml:8:8: port must be a whole number, not a fraction; write port = 1"],
    ),
    (
        "[server]\nport = 99999999999999999999\n",
        &[
            "c.toml:8:8: port is \"99999999999999999999\", not a number that fits; \
         write a whole number (port, 0 to 65535)",
        ],
    ),
    (
        "[server]\nhots = \"127.0.0.1\"\n",
        &["c.toml:8:1: unknown key \"hots\" in [server]; did you mean \"host\"?"],
    ),
    (
        "[server]\nhost = \"localhost\"\n",
        &["c.toml:8:8: host is \"localhost\", not an IP address; write \"127.0.0.1\""],
    ),
    (
        "[server]\nhost = \"eth0\"\n",
        &["c.toml:8:8: host is \"eth0\", not an IP address; \
         write it in numbers; host and interface names are not looked up"],
    ),
    (
        "[server]\nhost = 127\n",
        &["c.toml:8:8: host must be a string, not a number; write host = \"127.0.0.1\""],
    ),
    (
        "[server]\nhost = \"\"\n",
        &["c.toml:8:8: host is empty; write a value or leave it out"],
    ),
    (
        "[server]\nadvertise_host = \"0.0.0.0\"\n",
        &[
            "c.toml:8:18: advertise_host is a wildcard, which nobody can dial; \
         write an address of this machine",
        ],
    ),
    (
        "[server]\nport = 9090\n",
        &[
            "default: status_port is 9090, which is the request plane's port too; \
         write two different ports, or status_port = -1",
        ],
    ),
    (
        "[server]\nport = 80\nstatus_port = 80\n",
        &[
            "c.toml:9:15: status_port is 80, which is the request plane's port too; \
         write two different ports, or status_port = -1",
        ],
    ),
    (
        "[server]\nstatus_port = -2\n",
        &["c.toml:8:15: status_port is -2, outside -1 to 65535 (port); write -1"],
    ),
    (
        "[server]\nmessage_bytes_max = 1\n",
        &["c.toml:8:21: message_bytes_max is 1, outside 4096 to 1073741824 (bytes); write 4096"],
    ),
    (
        "[servr]\nport = 1\n",
        &["c.toml:7:2: unknown table \"servr\"; did you mean \"server\"?"],
    ),
    (
        "[[server]]\nport = 1\n",
        &["c.toml:7:3: [[server]] is written only once; write [server]"],
    ),
    (
        "[gpu]\nbackend = \"cuda\"\n",
        &[
            "c.toml:7:2: [gpu] has no devices, so no GPU memory is served; \
         write devices = \"0\", or remove the table",
        ],
    ),
    (
        "[planner]\nnames = \"seeds\"\n",
        &[
            "c.toml:7:2: [planner] has no socket, so no planner is listened to; \
         write socket = \"/run/corelane/planner.sock\"",
            "c.toml:8:9: unknown names \"seeds\"; \
         did you mean \"seed\"? possible are \"seed\" | \"1.6.1\" | \"both\"",
        ],
    ),
    (
        "[gpu]\ndevices = [0, \"x\"]\n",
        &[
            "c.toml:8:11: devices has \"x\", which is no number up to 63, nor a range of them; \
         write numbers and ranges with commas between, such as \"0-3,5\"",
        ],
    ),
    (
        "[gpu]\ndevices = 1.5\n",
        &["c.toml:8:11: devices must be a list; write devices = \"0-3,5\""],
    ),
    (
        "[gpu]\ndevices = 0\ntags = [\"weights\", \"kv cache\"]\n",
        &[
            "c.toml:9:8: tags has \"kv cache\", which is no plain name; \
         write 1 to 32 letters, digits, _ and -",
        ],
    ),
    (
        "[gpu]\ndevices = 0\nuids = \"root\"\n",
        &[
            "c.toml:9:8: uids has \"root\", which is no number up to 4294967295, \
         nor a range of them; write numbers and ranges with commas between, such as \"0-3,5\"",
        ],
    ),
    (
        "[gpu]\ndevices = 0\nbackend = \"cuda\"\ncapacity_bytes = 4096\n",
        &[
            "c.toml:10:18: warning: capacity_bytes bounds host memory only, \
         and backend is \"cuda\"; take it out",
        ],
    ),
    (
        "[gpu]\ndevices = 0\n\
         socket_dir = \"/run/a-name-that-is-rather-long-for-a-socket-to-lie-in\"\n",
        &[
            "c.toml:9:14: the socket /run/a-name-that-is-rather-long-for-a-socket-to-lie-in/\
         gms_GPU-00000000-0000-0000-0000-000000000000_kv_cache.sock has 113 bytes, \
         and 107 are allowed; write a shorter socket_dir",
        ],
    ),
    (
        "[zebra]\n",
        &[
            "c.toml:7:2: unknown table \"zebra\"; known are [server], [discovery], [[route]], \
         [[instance]], [core], [control], [tls], [drain], [gpu], [planner], \
         [events]",
        ],
    ),
    (
        "[events]\ntcp = \"tcp://127.0.0.1:5557\"\n",
        &["c.toml:8:7: tcp is written, and there is no broker; \
         write broker = true under [events] as well"],
    ),
    (
        "[events]\nbroker = true\nxsub = \"tcp://127.0.0.1:1\"\ntcp = \"tcp://127.0.0.1:1\"\n",
        &["c.toml:10:7: tcp is 127.0.0.1:1, which is xsub too; write another port"],
    ),
    (
        "[events]\nbroker = true\nbridge = \"zmq\"\n",
        &[
            "c.toml:9:10: bridge is zmq, and the other broker is not named; \
         write bridge_xsub and bridge_xpub, tcp://IP:PORT each",
        ],
    ),
    (
        "[events]\nbroker = true\ncpu = 77\n",
        &[
            "c.toml:9:7: cpu is 77, which this process may not use (0-3); \
         write one of these, or \"last\"",
        ],
    ),
    (
        "[discovery]\nbackend = \"kubernetes\"\n",
        &[
            "c.toml:8:11: backend = \"kubernetes\" is not in this version; \
         write \"memory\" | \"file\" | \"etcd\"",
        ],
    ),
    (
        "[discovery]\nbackend = \"mem\"\n",
        &["c.toml:8:11: unknown backend \"mem\"; write \"memory\" | \"file\" | \"etcd\""],
    ),
    (
        "[discovery]\nbackend = \"ectd\"\n",
        &["c.toml:8:11: unknown backend \"ectd\"; \
         did you mean \"etcd\"? possible are \"memory\" | \"file\" | \"etcd\""],
    ),
    (
        "[discovery]\nbackend = \"etcd\"\n",
        &[
            "c.toml:4:1: [[instance]] does not go with backend = \"etcd\"; \
         write backend = \"memory\" or \"file\", or remove it",
        ],
    ),
    (
        "[discovery]\nendpoints = [\"localhost\"]\n",
        &[
            "c.toml:8:13: endpoints has \"localhost\", which is no server address; \
         write it like \"http://localhost:2379\"",
        ],
    ),
    (
        "[discovery]\nendpoints = []\n",
        &["c.toml:8:13: endpoints is empty; write endpoints = [\"http://localhost:2379\"]"],
    ),
    (
        "[discovery]\nendpoints = [2379]\n",
        &["c.toml:8:13: endpoints must hold strings only; \
         write endpoints = [\"http://localhost:2379\"]"],
    ),
    (
        "[discovery]\nusername = \"me\"\n",
        &["c.toml:8:12: username without password; write password too, or leave both out"],
    ),
    (
        "[core]\ncpus = 3\n",
        &["c.toml:8:8: cpus must be a string, not a number; write cpus = \"3\""],
    ),
    (
        "[core]\ncpus = \"3-1\"\n",
        &["c.toml:8:8: cpus has the range 3-1, which runs backwards; write 1-3"],
    ),
    (
        "[core]\ncpus = \"0,a\"\n",
        &[
            "c.toml:8:8: cpus has \"a\", which is no CPU number or range; \
         write numbers and ranges with commas between, such as \"0-3,5\"",
        ],
    ),
    (
        "[core]\ncpus = \"0-2,1\"\n",
        &["c.toml:8:8: cpus names CPU 1 twice; write each CPU once"],
    ),
    (
        "[core]\ncpus = \"9\"\n",
        &[
            "c.toml:8:8: cpus names no CPU that this process may use (0-3); \
         write cpus = \"0-3\" or a part of it",
        ],
    ),
    (
        "[core]\ncpus = \"2-5\"\n",
        &[
            "c.toml:8:8: warning: this process may not use CPU 4-5 (only 0-3); \
         going on with cpus = \"2-3\"",
        ],
    ),
    (
        "[core]\nnic_queue = \"eth0:2\"\n",
        &[
            "c.toml:8:13: nic_queue = \"eth0:2\" is not in this version; \
         write nic_queue = \"none\" or leave it out",
        ],
    ),
    (
        "[core]\nbusy_poll_us = 50\n",
        &["c.toml:8:16: busy_poll_us = 50 is not in this version; \
         write busy_poll_us = 0 or leave it out"],
    ),
    (
        "[core]\nbuffers = 5000\n",
        &["c.toml:8:11: buffers is 5000, not a power of two; write 8192 or 4096"],
    ),
    (
        "[core]\nio = \"iouring\"\n",
        &["c.toml:8:6: unknown io \"iouring\"; \
         did you mean \"uring\"? possible are \"auto\" | \"uring\" | \"epoll\""],
    ),
    (
        "[core]\nidle = true\n",
        &["c.toml:8:8: idle must be a string, not true or false; write idle = \"block\""],
    ),
    (
        "[core]\ntimeout_s = 1\n",
        &["c.toml:8:1: unknown key \"timeout_s\" in [core]; it belongs under [drain]"],
    ),
    (
        "[control]\ncpu = 7\n",
        &[
            "c.toml:8:7: cpu is 7, which this process may not use (0-3); \
             write one of these, or \"last\"",
        ],
    ),
    (
        "[control]\ncpu = \"first\"\n",
        &["c.toml:8:7: cpu is \"first\", not a number that fits; write \"last\" or a CPU number"],
    ),
    (
        "[control]\ncpu = 1\n[core]\nidle = \"spin\"\n",
        &[
            "c.toml:8:7: warning: the control core shares CPU 1 with a data core that spins; \
         write idle = \"block\", or keep a CPU out of cpus",
        ],
    ),
    (
        "[drain]\ngrace_s = 1979-05-27\n",
        &["c.toml:8:11: grace_s must be a whole number, not a date; write grace_s = 1"],
    ),
    (
        "[drain]\nzzzz = 1\n",
        &["c.toml:8:1: unknown key \"zzzz\" in [drain]; known are grace_s, timeout_s"],
    ),
    (
        "[[instance]]\nendpoint = \"a/b/g\"\naddress = \"127.0.0.1:9/1/a/b/g\"\n",
        &["c.toml:9:11: the instance 127.0.0.1:9/1/a/b/g is there twice; remove one of the two"],
    ),
    (
        "[[instance]]\nendpoint = \"a/b/g\"\naddress = \"127.0.0.1:8/1/a/b/g\"\n",
        &["c.toml:9:11: two instances of a/b/g have the id 1; \
         write id = \"...\" with another number in one of them"],
    ),
    (
        "[[instance]]\nendpoint = \"a/b/g\"\naddress = \"worker:8/1/a/b/g\"\n",
        &[
            "c.toml:9:11: address is \"worker:8/1/a/b/g\", not IP:PORT/PATH; \
         write it like \"127.0.0.1:9000/1/dynamo/backend/generate\"",
        ],
    ),
    (
        "[[instance]]\nendpoint = \"a/b/g\"\n",
        &["c.toml:7:1: [[instance]] has no address; \
         write address = \"127.0.0.1:9000/1/dynamo/backend/generate\""],
    ),
    (
        "[[instance]]\nendpoint = \"b\"\naddress = \"127.0.0.1:8/2/a\"\n",
        &["c.toml:8:12: warning: endpoint is \"b\", which has 1 part; it is read as NS/b/E"],
    ),
    // Everything is told, not just the first, in the order of the file.
    (
        "[server]\nport = 70000\nhots = 1\n[core]\nio = \"x\"\n",
        &[
            "c.toml:8:8: port is 70000, outside 0 to 65535 (port); write 65535",
            "c.toml:9:1: unknown key \"hots\" in [server]; did you mean \"host\"?",
            "c.toml:11:6: unknown io \"x\"; write \"auto\" | \"uring\" | \"epoll\"",
        ],
    ),
];

/// Whole files.
const WHOLE: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "c.toml:1:1: there is no [[route]], so nothing would be served; \
         write [[route]] with listen and target below it",
        ],
    ),
    (
        "port = 1\n[[route]]\nlisten = \"a/r/g\"\ntarget = \"a/r/h\"\n\
         [discovery]\nbackend = \"file\"",
        &["c.toml:1:1: unknown key \"port\" outside any table; write it under [server]"],
    ),
    (
        "core = 1\n[[route]]\nlisten = \"a/r/g\"\ntarget = \"a/r/h\"\n\
         [discovery]\nbackend = \"file\"",
        &["c.toml:1:1: core is a table, not a key; write [core] and its keys below"],
    ),
    (
        "route = [1]\n",
        &[
            "c.toml:1:1: there is no [[route]], so nothing would be served; \
         write [[route]] with listen and target below it",
            "c.toml:1:10: route holds something that is no table; write [[route]] above its keys",
        ],
    ),
    (
        "[route]\nlisten = \"a/r/g\"\n",
        &[
            "c.toml:1:1: there is no [[route]], so nothing would be served; \
         write [[route]] with listen and target below it",
            "c.toml:1:2: [route] is written once for each route; write [[route]]",
        ],
    ),
    (
        "[discovery]\nbackend = \"file\"\n[[route]]\nlisten = \"a/r/g\"\n",
        &["c.toml:3:1: [[route]] has no target; write target = \"dynamo/backend/generate\""],
    ),
    (
        "[discovery]\nbackend = \"file\"\n[[route]]\npolcy = \"hash\"\n",
        &[
            "c.toml:3:1: [[route]] has no listen; write listen = \"dynamo/backend/generate\"",
            "c.toml:3:1: [[route]] has no target; write target = \"dynamo/backend/generate\"",
            "c.toml:4:1: unknown key \"polcy\" in [[route]]; did you mean \"policy\"?",
        ],
    ),
    // A value that was refused is not missing too.
    (
        "[discovery]\nbackend = \"file\"\n[[route]]\nlisten = 1\ntarget = \"a/b/c\"\n",
        &["c.toml:4:10: listen must be a string, not a number; \
         write listen = \"dynamo/backend/generate\""],
    ),
    (
        "[[route]]\nlisten = \"a/r/g\"\ntarget = \"a/b/g\"\n",
        &[
            "c.toml:3:10: warning: a/b/g has no instance, and discovery \"memory\" finds none; \
         write an [[instance]], or another [discovery] backend",
        ],
    ),
    (
        "[[route]]\nlisten = \"a/r/g\"\ntarget = \"dyn://a.r.g\"\n",
        &[
            "c.toml:3:10: target is a/r/g, the route's own listen: a request would come back; \
         write the endpoint of the workers",
        ],
    ),
    (
        "[[route\n",
        &[
            "c.toml:1:8: not valid TOML: unclosed array table, expected `]]`; \
         write key = value, with text in double quotes, under a [table]",
        ],
    ),
];

/// Keys of a route, after its listen and target in lines 3 to 5, with discovery elsewhere.
const IN_ROUTE: &[(&str, &[&str])] = &[
    (
        "policy = \"leastloaded\"",
        &[
            "c.toml:6:10: unknown policy \"leastloaded\"; did you mean \"least_loaded\"? \
             possible are \
         \"round_robin\" | \"random\" | \"power_of_two_choices\" | \"least_loaded\" | \"direct\" | \
         \"hash\" | \"kv\"",
        ],
    ),
    (
        "policy = \"kv\"\nlane = \"/tmp/lane.sock\"",
        &[
            "c.toml:7:8: policy = \"kv\" does not go with a lane: its workers publish no KV \
         events; write policy = \"least_loaded\", or take lane out",
        ],
    ),
    (
        "kv_blocks_max = 2048",
        &[
            "c.toml:6:17: warning: kv_blocks_max does nothing with policy = \"least_loaded\"; \
         write policy = \"kv\", or take it out",
        ],
    ),
    (
        "policy = \"kv\"\nkv_body_bytes_max = 70000",
        &["c.toml:7:21: kv_body_bytes_max is 70000, outside 0 to 65536 (bytes); write 65536"],
    ),
    (
        "policy = \"round_robin\"\nload = \"forward_pass\"",
        &[
            "c.toml:7:8: warning: load does nothing with policy = \"round_robin\"; \
         write policy = \"least_loaded\", or take it out",
        ],
    ),
    (
        "response = \"relay\"\nload = \"kv_metrics\"",
        &[
            "c.toml:7:8: warning: load does nothing with response = \"relay\"; \
         take it out: where responses pass through, load is known exactly",
        ],
    ),
    (
        "load_stale_ms = 1000",
        &[
            "c.toml:6:17: warning: load_stale_ms does nothing with load = \"own\"; \
         write load = \"forward_pass\" or \"kv_metrics\", or take it out",
        ],
    ),
    (
        "policy = \"hash\"",
        &["c.toml:6:10: policy = \"hash\" needs a header; \
         write header = \"x-session-id\" or another name"],
    ),
    (
        "policy = \"hash\"\nheader = \"a b\"",
        &["c.toml:7:10: header is \"a b\", not a header name; \
         write visible characters without blanks and quotes"],
    ),
    (
        "header = \"x\"",
        &[
            "c.toml:6:10: warning: header does nothing with policy = \"least_loaded\"; \
         write policy = \"hash\" or \"direct\", or take it out",
        ],
    ),
    (
        "response = \"relais\"",
        &[
            "c.toml:6:12: unknown response \"relais\"; did you mean \"relay\"? \
         possible are \"direct\" | \"relay\"",
        ],
    ),
    (
        "first_item_timeout_ms = 5",
        &[
            "c.toml:6:25: warning: first_item_timeout_ms does nothing with response = \"direct\"; \
         write response = \"relay\", or take it out",
        ],
    ),
    (
        "ack = \"onforward\"",
        &["c.toml:6:7: unknown ack \"onforward\"; \
         did you mean \"on_forward\"? possible are \"on_forward\" | \"on_accept\""],
    ),
    (
        "ack = \"on_accept\"\nlane = \"/run/x.sock\"",
        &[
            "c.toml:6:7: ack = \"on_accept\" does not go with a lane: its workers do not answer; \
         write ack = \"on_forward\", or take it out",
        ],
    ),
    (
        "lane = \"/run/x.sock\"\nlane_uids = \"1000,me\"",
        &[
            "c.toml:7:13: lane_uids is \"1000,me\", no list of users' numbers; \
         write lane_uids = \"1000,1001\"",
        ],
    ),
    (
        "lane_bytes = 4096",
        &[
            "c.toml:6:14: lane_bytes is 4096, outside 1048576 to 1073741824 (bytes); \
         write 1048576",
        ],
    ),
    (
        "ack_timeout_ms = 0",
        &["c.toml:6:18: ack_timeout_ms is 0, outside 1 to 600000 (milliseconds); write 1"],
    ),
    (
        "retries_max = 17",
        &["c.toml:6:15: retries_max is 17, outside 0 to 16 (attempts); write 16"],
    ),
    (
        "cpus = \"0\"",
        &["c.toml:6:1: unknown key \"cpus\" in [[route]]; it belongs under [core]"],
    ),
    (
        "[[route]]\nlisten = \"a.r.g\"\ntarget = \"a/x/g\"",
        &[
            "c.toml:7:10: a/r/g is offered twice, first at c.toml:4:10; \
         write another endpoint, or remove one of the two routes",
        ],
    ),
    (
        "[[route]]\nlisten = \"a/b/g\"\ntarget = \"a/r/g\"",
        &[
            "c.toml:5:10: routes form a loop: a/r/g -> a/b/g -> a/r/g; \
         write the endpoint of the workers",
            "c.toml:8:10: routes form a loop: a/b/g -> a/r/g -> a/b/g; \
         write the endpoint of the workers",
        ],
    ),
    (
        "[[route]]\nlisten = \"A/r/g\"\ntarget = \"a/x/g\"",
        &[
            "c.toml:7:10: listen has \"A\", a name that not every reader understands; \
         write a-z, 0-9, _ and - only",
        ],
    ),
    (
        "[[route]]\nlisten = \"a/r\"\ntarget = \"a/x/g/h\"",
        &[
            "c.toml:7:10: listen is \"a/r\", which has 2 parts; write namespace/component/endpoint",
            "c.toml:8:10: warning: target is \"a/x/g/h\", which has 4 parts; it is read as a/x/g_h",
        ],
    ),
];

#[test]
fn what_is_wrong_is_said_where_it_is() {
    let mut cases = 0;
    let mut wrong = Vec::new();
    let mut case = |text: String, expected: &[&str]| {
        let checked = load(&inputs(&text));
        let errors = checked.errors().count();
        assert_eq!(checked.config.is_none(), errors > 0, "{text}");
        let found = lines(&checked);
        if found != expected {
            wrong.push(format!("{text}\nexpected {expected:#?}\nfound {found:#?}"));
        }
        cases += 1;
    };
    for (text, expected) in AFTER_ROUTE {
        case(format!("{ROUTE}{text}"), expected);
    }
    for (text, expected) in WHOLE {
        case((*text).to_owned(), expected);
    }
    for (text, expected) in IN_ROUTE {
        let before = "[discovery]\nbackend = \"file\"\n[[route]]\nlisten = \"a/r/g\"\n";
        case(format!("{before}target = \"a/b/g\"\n{text}\n"), expected);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(cases >= 40);
}

#[test]
fn defaults_are_those_of_the_table() {
    let config = good(&inputs(ROUTE));
    assert_eq!(config.server.host, IpAddr::from([127, 0, 0, 1]));
    assert_eq!(
        (config.server.port, config.server.status_port),
        (0, Some(9_090))
    );
    assert_eq!(config.server.message_bytes_max, 33_554_432);
    assert_eq!(config.discovery.backend, Backend::Memory);
    assert_eq!(config.discovery.endpoints, ["http://localhost:2379"]);
    assert_eq!(config.routes[0].policy, Policy::LeastLoaded);
    assert_eq!(config.routes[0].ack_timeout_ms, 5_000);
    assert_eq!(config.instances[0].id, 1);
    assert_eq!(config.cores.len(), 4);
    assert_eq!(config.cores[3].cpu, 3);
    assert_eq!(
        (config.cores[0].idle, config.cores[0].io),
        (Idle::Block, Io::Auto)
    );
    assert_eq!(
        (config.cores[0].buffers, config.cores[0].in_flight_max),
        (4_096, 65_536)
    );
    assert_eq!((config.drain.grace_s, config.drain.timeout_s), (5, 900));
}

/// Every key of the table is asked for, and what is asked for stands in the table.
#[test]
fn every_key_is_read() {
    let checked = load(&inputs(&format!("{ROUTE}[gpu]\ndevices = 0\n")));
    let plain = |path: &str| match path.split_once('[') {
        Some((section, rest)) => {
            format!(
                "{section}.{}",
                rest.split_once('.').map_or("", |(_, name)| name)
            )
        }
        None => path.to_owned(),
    };
    let read: BTreeSet<String> = checked.settings.iter().map(|s| plain(&s.path)).collect();
    let table: BTreeSet<String> = keys().iter().map(|key| key.path()).collect();
    assert_eq!(read, table);
}

/// The greatest and the least number of every key fit into the configuration's own types.
#[test]
fn every_bound_fits() {
    for key in keys() {
        let (Kind::Int { min, max, .. } | Kind::PowerOfTwo { min, max, .. }) = key.kind else {
            continue;
        };
        for number in [min, max] {
            let mut inputs = inputs(ROUTE);
            inputs.overrides.push(Override {
                flag: "--x".into(),
                key,
                text: number.to_string(),
            });
            let checked = load(&inputs);
            assert!(
                checked.config.is_some(),
                "{} = {number}: {:?}",
                key.path(),
                lines(&checked)
            );
            for (key, text) in [(key, (min - 1).to_string()), (key, (max + 1).to_string())] {
                inputs.overrides = vec![Override {
                    flag: "--x".into(),
                    key,
                    text,
                }];
                assert!(
                    load(&inputs).config.is_none(),
                    "{} takes too much",
                    key.path()
                );
            }
        }
    }
}

#[test]
fn a_missing_cpu_of_the_default_is_nobodys_fault() {
    let mut inputs = inputs(ROUTE);
    for (cpus, data, control) in [
        (vec![0, 1], vec![0, 1], 1),
        (vec![0], vec![0], 0),
        (vec![0, 1, 2, 3, 4, 5, 6, 7], vec![0, 1, 2, 3], 7),
        (vec![8, 9], vec![8, 9], 9),
    ] {
        inputs.host = host(cpus);
        let checked = load(&inputs);
        assert_eq!(lines(&checked), Vec::<String>::new());
        let config = checked.config.unwrap();
        let found: Vec<usize> = config.cores.iter().map(|core| core.cpu).collect();
        assert_eq!((found, config.control.cpu), (data, control));
    }
}

/// A folder with `corelane.toml` and files in `cores.d`.
fn folder(main: &str, cores: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("corelane.toml");
    std::fs::write(&path, main).unwrap();
    std::fs::create_dir(folder.path().join("cores.d")).unwrap();
    for (name, text) in cores {
        std::fs::write(folder.path().join("cores.d").join(name), text).unwrap();
    }
    (folder, path)
}

/// Where a value came from, with the folder cut off.
fn origin(config: &Config, path: &str, folder: &Path) -> (String, String) {
    let found = config
        .settings
        .iter()
        .find(|setting| setting.path == path)
        .unwrap();
    let at = found
        .origin
        .to_string()
        .replace(&format!("{}/", folder.display()), "");
    (found.value.clone().unwrap_or_default(), at)
}

#[test]
fn flag_over_environment_over_core_file_over_file_over_default() {
    let main = format!("{ROUTE}[core]\nio = \"uring\"\n");
    let (folder, path) = folder(
        &main,
        &[("1.toml", "[core]\nio = \"epoll\"\nidle = \"spin\"\n")],
    );
    let mut inputs = inputs("");
    inputs.main = Main::File(path);
    let of = |inputs: &Inputs, path: &str| {
        let (value, at) = origin(&good(inputs), path, folder.path());
        format!("{value} ({at})")
    };
    assert_eq!(of(&inputs, "core[0].io"), "uring (corelane.toml:8:6)");
    assert_eq!(of(&inputs, "core[1].io"), "epoll (cores.d/1.toml:2:6)");
    assert_eq!(of(&inputs, "core[1].idle"), "spin (cores.d/1.toml:3:8)");
    assert_eq!(of(&inputs, "core[0].idle"), "block (default)");
    inputs.env = env(&[("CORELANE_IO", "auto")]);
    assert_eq!(of(&inputs, "core[1].io"), "auto (environment CORELANE_IO)");
    inputs.overrides = vec![set("core.io", "uring"), set("core.io", "epoll")];
    assert_eq!(of(&inputs, "core[1].io"), "epoll (flag --set core.io)");
    assert_eq!(good(&inputs).cores[1].io, Io::Epoll);
}

#[test]
fn core_files_are_held_to_their_table() {
    let (folder, path) = folder(
        ROUTE,
        &[
            ("0.toml", "[core]\ncpus = \"0\"\n"),
            ("1.toml", "[server]\nport = 1\n"),
            ("2.toml", "idle = \"spin\"\n"),
            ("3.toml", "[core]\nbusy_poll_us = 5\n"),
            ("9.toml", "[core]\nidle = \"spin\"\n"),
            ("01.toml", ""),
            ("README", "not read"),
        ],
    );
    let mut inputs = inputs("");
    inputs.main = Main::File(path);
    let cut = format!("{}/cores.d/", folder.path().display());
    let found: Vec<String> = lines(&load(&inputs))
        .iter()
        .map(|l| l.replace(&cut, ""))
        .collect();
    assert_eq!(
        found,
        [
            "0.toml:2:1: cpus is the same for every core; move it to the main file",
            "01.toml:1:1: is not named after a CPU; \
         name it like 0.toml or 12.toml, or give it another ending",
            "1.toml:1:2: [server] is not for a file of one core; move it to the main file",
            "2.toml:1:1: unknown key \"idle\" outside any table; write it under [core]",
            "3.toml:2:16: busy_poll_us = 5 is not in this version; \
         write busy_poll_us = 0 or leave it out",
            "9.toml:1:1: warning: CPU 9 is no data core, so this file does nothing; \
         add 9 to cpus under [core], or remove the file",
        ]
    );
}

#[test]
fn files_that_cannot_be_read() {
    let (folder, path) = folder("[server]\nhost = \"\u{fc}", &[]);
    let mut inputs = inputs("");
    let mut first = |path: &Path| {
        inputs.main = Main::File(path.to_owned());
        let found = lines(&load(&inputs)).remove(0);
        found.replace(&format!("{}/", folder.path().display()), "")
    };
    let missing = first(&folder.path().join("none.toml"));
    assert!(
        missing.starts_with("none.toml:1:1: cannot be read: no such file"),
        "{missing}"
    );
    assert!(first(folder.path()).contains(":1:1: cannot be read: is a directory"));
    std::fs::write(&path, b"[server]\nhost = \"\xff\"").unwrap();
    assert_eq!(
        first(&path),
        "corelane.toml:2:9: is not UTF-8; save the file as UTF-8"
    );
    std::fs::write(&path, "#".repeat((1 << 20) + 1)).unwrap();
    assert!(first(&path).starts_with("corelane.toml:1:1: is longer than 1 MiB; "));
}

#[test]
fn dynamos_names_mean_the_same() {
    let mut inputs = inputs(&ROUTE[..ROUTE.find("[[instance]]").unwrap()]);
    inputs.env = env(&[
        ("DYN_DISCOVERY_BACKEND", "etcd"),
        ("ETCD_ENDPOINTS", "http://a:1, b:2"),
        ("ETCD_LEASE_TTL", "60"),
        ("ETCD_AUTH_USERNAME", "me"),
        ("ETCD_AUTH_PASSWORD", "hunter2"),
        ("DYN_TCP_RPC_HOST", "[::1]"),
        ("DYN_TCP_RPC_PORT", "7000"),
        ("DYN_SYSTEM_PORT", "-5"),
        ("DYN_SYSTEM_HOST", "0.0.0.0"),
        ("DYN_TCP_MAX_MESSAGE_SIZE", "65536"),
        ("DYN_TCP_REQUEST_TIMEOUT", "7"),
        ("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "30"),
        ("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "1"),
        ("DYN_FILE_KV", "/kv"),
    ]);
    let config = good(&inputs);
    assert_eq!(config.discovery.backend, Backend::Etcd);
    assert_eq!(config.discovery.endpoints, ["http://a:1", "b:2"]);
    assert_eq!(config.discovery.lease_ttl_s, 60);
    assert_eq!(config.discovery.path, Path::new("/kv"));
    assert_eq!(config.server.host.to_string(), "::1");
    assert_eq!(
        (config.server.port, config.server.status_port),
        (7_000, None)
    );
    assert!(config.server.status_host.is_unspecified());
    assert_eq!(config.server.message_bytes_max, 65_536);
    assert_eq!(config.routes[0].ack_timeout_ms, 7_000);
    assert_eq!((config.drain.grace_s, config.drain.timeout_s), (1, 30));
    // What Dynamo's own reader would be told is what was resolved.
    assert_eq!(
        config.discovery.variable("ETCD_ENDPOINTS").as_deref(),
        Some("http://a:1,b:2")
    );
    assert_eq!(
        config.discovery.variable("ETCD_AUTH_PASSWORD").as_deref(),
        Some("hunter2")
    );
    assert!(
        !format!("{config:?}").contains("hunter2"),
        "a password is never shown"
    );
    inputs.env = env(&[("DYN_DISCOVERY_BACKEND", "mem")]);
    assert_eq!(good(&inputs).discovery.backend, Backend::Memory);
}

#[test]
fn faults_of_environment_and_flags_name_them() {
    let mut inputs = inputs(ROUTE);
    inputs.env = env(&[
        ("CORELANE_SERVER_PORT", "tcp://10.0.0.1:80"),
        ("DYN_TCP_RPC_PORT", "http"),
        ("DYN_REQUEST_PLANE", "http"),
        ("CORELANE_BUFFERS", "  "),
    ]);
    inputs.overrides = vec![set("core.io", "fast")];
    assert_eq!(
        lines(&load(&inputs)),
        [
            "flag --set core.io: unknown io \"fast\"; write \"auto\" | \"uring\" | \"epoll\"",
            "environment CORELANE_SERVER_PORT: port is tcp://10.0.0.1:80, a service link of \
         Kubernetes; set enableServiceLinks: false in the pod, or rename the service",
            "environment DYN_REQUEST_PLANE: the request plane is tcp or nats, not \"http\"; \
         write tcp or nats, or unset it",
            "environment DYN_TCP_RPC_PORT: port is \"http\", not a number that fits; \
         write a whole number (port, 0 to 65535)",
        ]
    );
}

#[test]
fn etcds_times_and_certificates() {
    let mut inputs = inputs(&ROUTE[..ROUTE.find("[[instance]]").unwrap()]);
    inputs.overrides = vec![
        set("discovery.backend", "etcd"),
        set("discovery.keepalive_interval_s", "4"),
        set("discovery.lease_ttl_s", "10"),
        set("discovery.client_cert", "-----BEGIN x"),
        set("discovery.client_key", "/no/such/file"),
    ];
    assert_eq!(
        lines(&load(&inputs)),
        [
            "flag --set discovery.client_cert: client_cert without ca; \
         write ca too, or leave client_cert out",
            "flag --set discovery.client_key: client_key is neither PEM text nor a file \
             that can be \
         read; write the path of a PEM file",
            "flag --set discovery.keepalive_interval_s: warning: keepalive_interval_s is 4, which \
         etcd may refuse; write 5 or more",
            "flag --set discovery.lease_ttl_s: warning: a dead connection to etcd is seen after \
             14 s, \
         the lease ends after 10; write a longer lease_ttl_s, or a shorter keepalive_interval_s",
        ]
    );
}

#[test]
fn open_files_are_counted_when_someone_asked() {
    let mut inputs = inputs(&format!("{ROUTE}[core]\nconnections_max = 1000\n"));
    inputs.host.files_max = Some(4_000);
    assert_eq!(
        lines(&load(&inputs)),
        [
            "c.toml:8:19: warning: connections_max of all cores is 4000, open files 4000; \
         raise the limit (ulimit -n 4064)",
        ]
    );
    inputs.host.files_max = Some(4_064);
    assert!(lines(&load(&inputs)).is_empty());
}

#[test]
fn a_peer_reads_only_what_concerns_it() {
    let mut inputs = inputs("");
    inputs.purpose = Purpose::Peer;
    inputs.main = Main::Nothing;
    inputs.env = env(&[("CORELANE_IO", "nonsense"), ("DYN_FILE_KV", "/kv")]);
    let config = good(&inputs);
    assert!(config.routes.is_empty());
    assert_eq!(config.discovery.path, Path::new("/kv"));
}

#[test]
fn behind_a_wildcard_an_address_that_can_be_dialled_is_advertised() {
    let mut inputs = inputs(&format!("{ROUTE}[server]\nhost = \"0.0.0.0\"\n"));
    let advertised = good(&inputs).server.advertised();
    assert!(!advertised.is_unspecified() && advertised.is_ipv4());
    inputs.overrides = vec![set("server.advertise_host", "10.9.8.7")];
    assert_eq!(good(&inputs).server.advertised().to_string(), "10.9.8.7");
}

/// The examples of the repository.
fn examples() -> BTreeMap<String, PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let tomls = entries.filter(|path| path.extension().is_some_and(|e| e == "toml"));
    tomls
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                path,
            )
        })
        .collect()
}

#[test]
fn the_examples_are_right() {
    let examples = examples();
    for needed in [
        "corelane.toml",
        "minimal.toml",
        "etcd.toml",
        "affinity.toml",
    ] {
        assert!(examples.contains_key(needed), "{needed}");
    }
    for (name, path) in examples {
        let checked = load(&Inputs {
            main: Main::File(path),
            ..inputs("")
        });
        assert!(
            checked.config.is_some() && checked.problems.is_empty(),
            "{name}: {:?}",
            lines(&checked)
        );
    }
}

/// `examples/corelane.toml` says it has every key with its default: it is held to that, keys in
/// comments included.
#[test]
fn the_full_example_has_every_key_with_its_default() {
    let text = std::fs::read_to_string(&examples()["corelane.toml"]).unwrap();
    let checked = load(&inputs(&text));
    for key in keys() {
        let mut section = "";
        let written = text.lines().any(|line| {
            let line = line.trim_start_matches("# ");
            if let Some(rest) = line.strip_prefix('[') {
                section = rest
                    .trim_start_matches('[')
                    .split(']')
                    .next()
                    .unwrap_or_default();
            }
            section == key.section.name() && line.starts_with(&format!("{} = ", key.name))
        });
        assert!(written, "{} is not in the example", key.path());
        let variables = key
            .aliases
            .iter()
            .filter(|alias| !text.contains(alias.name));
        assert_eq!(
            variables.count(),
            0,
            "a variable of {} is missing",
            key.path()
        );
        if let Fallback::Value(default) = key.fallback {
            for setting in checked
                .settings
                .iter()
                .filter(|setting| setting.key == *key)
            {
                assert_eq!(setting.value.as_deref(), Some(default), "{}", setting.path);
                let from_file = matches!(setting.origin, Origin::File { .. });
                assert!(from_file, "{} is in a comment only", setting.path);
            }
        }
    }
    assert!(
        Section::ALL
            .iter()
            .all(|section| text.contains(&section.header()))
    );
}

/// A line of an example, changed in one of the ways in which people and editors break files.
fn broken(line: &str, how: usize, with: &str) -> String {
    let (name, value) = line.split_once('=').unwrap_or((line, ""));
    match how {
        0 => String::new(),
        1 => name.to_owned(),
        2 => format!("{name}= {with}"),
        3 => format!("{with} = {value}"),
        4 => format!("{line}\n{line}"),
        5 => line.chars().rev().collect(),
        6 => line.replace('"', ""),
        7 => line.chars().take(line.chars().count() / 2).collect(),
        8 => format!("{name}= [{value}]"),
        _ => format!("[{with}]\n{line}"),
    }
}

proptest! {
    // As many as `PROPTEST_CASES` says, or 256; not optimised each takes 10 ms and more.

    /// However a good file is broken, an answer comes, and each of its lines has a place.
    #[test]
    fn broken_examples_get_an_answer(
        which in 0_usize..16,
        changes in prop::collection::vec((0_usize..200, 0_usize..10, ".{0,12}"), 1..4),
    ) {
        let examples: Vec<PathBuf> = examples().into_values().collect();
        let text = std::fs::read_to_string(&examples[which % examples.len()]).unwrap();
        let mut text: Vec<String> = text.lines().map(str::to_owned).collect();
        for (line, how, with) in changes {
            let line = line % text.len();
            text[line] = broken(&text[line], how, &with);
        }
        let checked = load(&inputs(&text.join("\n")));
        prop_assert_eq!(checked.config.is_none(), checked.errors().count() > 0);
        for problem in &checked.problems {
            let line = problem.to_string();
            prop_assert!(!line.contains('\n') && line.contains("; "), "{}", line);
            let placed = matches!(problem.at, Origin::File { line: 1.., column: 1.., .. });
            prop_assert!(placed || problem.at == Origin::Default, "{}", line);
        }
    }

    /// Any text at all.
    #[test]
    fn any_text_gets_an_answer(text in "(?s).{0,200}") {
        let checked = load(&inputs(&text));
        prop_assert_eq!(checked.config.is_none(), checked.errors().count() > 0);
    }

    /// Any value for any key, from flag or environment.
    #[test]
    fn any_value_gets_an_answer(which in 0_usize..1_000, text in ".{0,40}", flag: bool) {
        let key = keys()[which % keys().len()];
        let mut inputs = inputs(ROUTE);
        match (flag, key.env()) {
            (false, Some(name)) => inputs.env = env(&[(&name, &text)]),
            _ => inputs.overrides = vec![set(&key.path(), &text)],
        }
        let checked = load(&inputs);
        prop_assert_eq!(checked.config.is_none(), checked.errors().count() > 0);
    }
}
