//! Broken configurations, and what is to be said of each.

/// Text after [`ROUTE`], so its first line is line 7, and everything that must be said.
pub(crate) const AFTER_ROUTE: &[(&str, &[&str])] = &[
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
         [events], [reload]",
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
        "[events]\nbroker = true\ncurve_xsub = \"tcp://127.0.0.1:1\"\n",
        &["c.toml:9:14: curve_xsub without curve_xpub; write curve_xpub too"],
    ),
    (
        "[events]\ncurve_server_key = \"short\"\n",
        &[
            "c.toml:8:20: curve_server_key: a CURVE key is 40 characters of Z85, as ZMQ writes it; \
         this has 5; write the 40 characters that corelane events keys has told",
        ],
    ),
    (
        "[events]\ncurve_secret_key_file = \"/no/such/file\"\n",
        &[
            "c.toml:8:25: curve_secret_key_file: /no/such/file cannot be read: no such file or \
         directory; name a file that can be read; corelane events keys writes one",
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
        "[core]\nnic_queue = \"eth0\"\n",
        &[
            "c.toml:8:13: nic_queue is \"eth0\", neither DEVICE:QUEUE nor none; \
         write it like \"eth0:2\"",
        ],
    ),
    (
        "[server]\nsteering = \"queue\"\n",
        &[
            "c.toml:8:12: steering = \"queue\", and no core has a nic_queue; \
         write nic_queue in cores.d/<n>.toml, or steering = \"cpu\"",
        ],
    ),
    (
        "[core]\nidle = \"spin\"\nbusy_poll_us = 500\n",
        &[
            "c.toml:9:16: warning: busy_poll_us is 500 with idle = \"spin\": \
         tasks of the core wait as long; write 100 or less, or idle = \"block\"",
            "default: warning: the control core shares CPU 3 with a data core that spins; \
         write idle = \"block\", or keep a CPU out of cpus",
        ],
    ),
    (
        "[core]\nbusy_poll_us = 20000\n",
        &["c.toml:8:16: busy_poll_us is 20000, outside 0 to 10000 (microseconds); write 10000"],
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
pub(crate) const WHOLE: &[(&str, &[&str])] = &[
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
pub(crate) const IN_ROUTE: &[(&str, &[&str])] = &[
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
