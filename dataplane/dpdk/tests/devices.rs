//! Devices that need no hardware, without huge pages.

#![expect(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::print_stdout, reason = "says what is skipped")]

mod common;

use common::{eal, open, read_pcap, write_pcap};
use dpdk::{Eal, EalError, Mbuf, Pool, PoolError, Port};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

fn frames(count: u8) -> Vec<Vec<u8>> {
    (0..count).map(|number| vec![number; 60 + usize::from(number)]).collect()
}

#[test]
fn a_ring_gives_back_the_same_buffers_in_order() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "ring", 256, 1518).unwrap();
    let mut port = open(eal, pool, "net_ring0").unwrap();
    let mut packets: Vec<Mbuf> = frames(100).iter().map(|frame| pool.packet(frame).unwrap()).collect();
    let places: Vec<*const u8> = packets.iter().map(|packet| packet.data().as_ptr()).collect();
    assert_eq!(port.tx_burst(&mut packets), 100);
    assert!(packets.is_empty());
    while port.rx_burst(&mut packets).packets > 0 {}
    assert!(packets.iter().map(Mbuf::data).eq(frames(100)));
    assert!(packets.iter().map(|packet| packet.data().as_ptr()).eq(places));
    packets[0].data_mut()[0] = 7;
    assert_eq!(packets[0].data()[0], 7);
    Mbuf::free(&mut packets);
    assert_eq!(pool.available(), 256);
}

#[test]
fn a_full_device_leaves_the_rest_with_the_caller_in_order() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "full", 4096, 1518).unwrap();
    let mut port = open(eal, pool, "net_ring1").unwrap();
    let mut packets: Vec<Mbuf> =
        (0..2000u32).map(|number| pool.packet(&[number.to_be_bytes(); 15].concat()).unwrap()).collect();
    let sent = port.tx_burst(&mut packets);
    assert!((1..2000).contains(&sent), "the ring is shorter than that: {sent}");
    let first = packets[0].data();
    assert_eq!((packets.len(), &first[..4]), (2000 - sent, &(sent as u32).to_be_bytes()[..]));
    drop(packets);
    drop(port);
}

#[test]
fn captures_are_read_and_written() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "pcap", 256, 1518).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (rx, tx) = (directory.path().join("rx.pcap"), directory.path().join("tx.pcap"));
    write_pcap(&rx, &frames(70));
    let device = format!("net_pcap0,rx_pcap={},tx_pcap={}", rx.display(), tx.display());
    let mut port = open(eal, pool, device).unwrap();
    let mut packets = Vec::new();
    while port.rx_burst(&mut packets).packets > 0 {}
    assert_eq!(port.tx_burst(&mut packets), 70);
    assert_eq!((port.statistics().received, port.statistics().sent), (70, 70));
    drop(port);
    assert_eq!(read_pcap(&tx), frames(70));
}

#[test]
fn a_frame_over_the_mtu_is_dropped_and_counted() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "oversize", 256, 1518).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let rx = directory.path().join("rx.pcap");
    // One that fits a buffer, and one that takes several.
    write_pcap(&rx, &[vec![1; 1518], vec![2; 1519], vec![3; 9000], vec![4; 60]]);
    let mut port = open(eal, pool, format!("net_pcap1,rx_pcap={}", rx.display())).unwrap();
    let (mut packets, mut oversize) = (Vec::new(), 0);
    loop {
        let received = port.rx_burst(&mut packets);
        oversize += received.oversize;
        if received == dpdk::Received::default() {
            break;
        }
    }
    assert_eq!((packets.iter().map(|packet| packet.data()[0]).collect(), oversize), (vec![1, 4], 2));
    Mbuf::free(&mut packets);
    drop(port);
    assert_eq!(pool.available(), 256);
}

#[test]
fn a_null_device_receives_and_sends() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "null", 256, 1518).unwrap();
    let mut port = open(eal, pool, "net_null0,size=1500,copy=1").unwrap();
    let mut packets = Vec::new();
    let received = port.rx_burst(&mut packets);
    assert_eq!((received.packets, packets[0].data().len()), (32, 1500));
    assert_eq!(port.tx_burst(&mut packets), 32);
    assert_eq!(port.statistics().sent, 32);
}

#[test]
fn a_pool_without_free_buffers_is_survived() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "exhausted", 64, 1518).unwrap();
    let mut port = open(eal, pool, "net_null1").unwrap();
    let mut kept = Vec::new();
    while port.rx_burst(&mut kept).packets > 0 {}
    while let Some(packet) = pool.packet(&[1; 60]) {
        kept.push(packet);
    }
    assert_eq!((kept.len(), pool.available()), (64, 0));
    Mbuf::free(&mut kept);
    assert_eq!(port.rx_burst(&mut kept).packets, 32);
}

#[test]
fn a_packet_longer_than_a_buffer_is_not_made() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "long", 64, 1518).unwrap();
    assert!(pool.packet(&vec![0; usize::from(pool.room()) + 1]).is_none());
    assert_eq!(pool.available(), 64);
}

#[test]
fn a_link_that_goes_down_and_comes_back_is_seen() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "link", 64, 1518).unwrap();
    let mut port = open(eal, pool, "net_ring2").unwrap();
    assert!(port.is_link_up());
    assert!(port.set_link(false));
    assert!(!port.is_link_up());
    assert!(port.set_link(true));
    assert!(port.is_link_up());
}

/// Sends until one comes out at the other end: both sides need a moment to see one another.
fn cross(pool: Pool, from: &mut Port, to: &mut Port) -> Mbuf {
    let mut received = Vec::new();
    for _ in 0..500 {
        from.tx_burst(&mut vec![pool.packet(&[9; 100]).unwrap()]);
        std::thread::sleep(std::time::Duration::from_millis(10));
        if to.rx_burst(&mut received).packets > 0 {
            return received.remove(0);
        }
    }
    panic!("nothing came through");
}

#[test]
fn packets_cross_a_shared_memory_interface() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "memif", 8192, 1518).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let device = |number: u8, role: &str| {
        let socket = directory.path().join("memif");
        format!("net_memif{number},role={role},socket={},socket-abstract=no", socket.display())
    };
    let mut server = open(eal, pool, device(0, "server")).unwrap();
    assert!(!server.is_link_up(), "nobody is there yet");
    let mut client = open(eal, pool, device(1, "client")).unwrap();
    assert_eq!(cross(pool, &mut client, &mut server).data(), [9; 100]);
    assert_eq!(cross(pool, &mut server, &mut client).data(), [9; 100]);
    assert!(server.is_link_up());
    drop(client);
    assert!((0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        !server.is_link_up()
    }));
}

#[test]
fn packets_cross_a_vhost_socket_and_wake_a_sleeper() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "vhost", 8192, 1518).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vhost").display().to_string();
    let mut switch = open(eal, pool, format!("net_vhost0,iface={socket}")).unwrap();
    let mut worker = open(eal, pool, format!("net_virtio_user0,path={socket}")).unwrap();
    assert_eq!(cross(pool, &mut switch, &mut worker).data(), [9; 100]);
    let packet = cross(pool, &mut worker, &mut switch);
    assert_eq!(packet.data(), [9; 100]);
    assert!(!packet.is_checksum_partial());
    drop(packet);

    let mut left = Vec::new();
    while worker.rx_burst(&mut left).packets > 0 {}
    let is_readable = |worker: &Port, timeout: PollTimeout| {
        let descriptor = worker.wake_descriptor().unwrap();
        poll(&mut [PollFd::new(descriptor, PollFlags::POLLIN)], timeout).unwrap() > 0
    };
    worker.disarm();
    worker.arm();
    assert!(!is_readable(&worker, PollTimeout::ZERO));
    switch.tx_burst(&mut vec![pool.packet(&[8; 100]).unwrap()]);
    assert!(is_readable(&worker, PollTimeout::from(10_000u16)));
    worker.disarm();
    assert!(!is_readable(&worker, PollTimeout::ZERO));
    assert_eq!(worker.rx_burst(&mut left).packets, 1);
}

/// A worker that was killed leaves its socket; a new one takes its place. What is not a socket is left alone.
#[test]
fn a_vhost_server_comes_back_where_a_killed_one_was() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "again", 8192, 1518).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vhost");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = path.display();
    let mut switch = open(eal, pool, format!("net_vhost1,iface={socket},client=1")).unwrap();
    let mut worker = open(eal, pool, format!("net_virtio_user1,path={socket},server=1")).unwrap();
    assert_eq!(cross(pool, &mut switch, &mut worker).data(), [9; 100]);

    let file = directory.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let device = format!("net_virtio_user2,path={},server=1", file.display());
    assert!(open(eal, pool, device).is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
}

/// A network namespace of this thread alone, with two pairs of interfaces; nothing where that is not allowed.
fn namespace() -> Option<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
    let commands = [
        "link add other0 type veth peer name other1",
        "link add own0 type veth peer name own1",
        "link set other0 up",
        "link set other1 up",
        "link set own0 up",
        "link set own1 up",
        "address add 192.0.2.1/24 dev other0",
        "neighbor add 192.0.2.2 lladdr 02:00:00:00:00:01 nud permanent dev other0",
    ];
    for command in commands {
        let done = std::process::Command::new("ip").args(command.split(' ')).status().unwrap();
        assert!(done.success(), "ip {command}");
    }
    Some(())
}

/// What comes in elsewhere while the device starts would be taken for its own.
#[test]
fn a_packet_socket_never_gives_what_came_in_at_other_interfaces() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "foreign", 2048, 1518).unwrap();
    let apart = std::thread::spawn(move || {
        if namespace().is_none() {
            println!("SKIPPED: no network namespace can be made here");
            return;
        }
        let ends = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let socket = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
                for _ in 0..10_000_000 {
                    if ends.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    // A full queue is no matter.
                    let _ = socket.send_to(&[7; 200], "192.0.2.2:9");
                }
            });
            let foreign = |number: u32| {
                let mut port =
                    open(eal, pool, format!("net_af_packet{number},iface=own0,framecnt=4096")).unwrap();
                let mut received = Vec::new();
                while port.rx_burst(&mut received).packets > 0 {}
                let foreign = received.iter().filter(|packet| packet.data().ends_with(&[7; 200])).count();
                Mbuf::free(&mut received);
                foreign
            };
            let all: Vec<usize> = (20..30).map(foreign).collect();
            ends.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(all, [0; 10]);
        });
    });
    apart.join().unwrap();
}

#[test]
fn a_device_that_cannot_be_opened_is_named_with_a_remedy() {
    let (eal, _turn) = eal();
    let pool = Pool::new(eal, "missing", 64, 1518).unwrap();
    for (device, remedy) in [
        ("net_af_packet0,iface=nosuch0", "no interface \"nosuch0\": name one that `ip link` shows"),
        ("net_pcap9,rx_pcap=/nowhere.pcap", "see that the files of rx_pcap= are there"),
        ("net_virtio_user9,path=/nowhere/socket", "add server=1"),
        ("net_nosuch0", "see that the driver is installed"),
        ("net_null9,nosuch=1", "name and arguments are right"),
    ] {
        let error = open(eal, pool, device).unwrap_err().to_string();
        assert!(error.contains(device) && error.contains(remedy), "{error}");
    }
    let mut pci = common::port_config("");
    pci.device = dpdk::Device::Pci("ffff:ff:1f.7".to_owned());
    let error = dpdk::Port::open(eal, pool, &pci).unwrap_err().to_string();
    assert!(error.contains("no such device: `dpdk-devbind.py --status-dev net`"), "{error}");
}

#[test]
fn a_pool_that_does_not_fit_says_how_much_memory_would_do() {
    let (eal, _turn) = eal();
    let error = Pool::new(eal, "huge", 1 << 20, 1518).unwrap_err();
    assert!(matches!(error, PoolError::Memory { needed_mb: 2000..4000, .. }), "{error}");
    assert!(error.to_string().contains("raise memory_mb to "), "{error}");
}

#[test]
fn a_second_start_is_refused() {
    let (_, _turn) = eal();
    assert!(matches!(Eal::start(&common::config()), Err(EalError::Started)));
}
