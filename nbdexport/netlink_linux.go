package nbdexport

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// The generic netlink family "nbd", version 1. The process needs CAP_SYS_ADMIN.
//
//	Command         Request                                     Answer
//	1 CONNECT       [INDEX] SIZE_BYTES SOCKETS [...]            CONNECT { INDEX }
//	2 DISCONNECT    INDEX                                       ack
//	3 RECONFIGURE   INDEX [BACKEND_IDENTIFIER] [SOCKETS] [...]  ack
//	4 LINK_DEAD     (multicast by the kernel; not used: it reaches one network namespace only)
//	5 STATUS        [INDEX]                                     STATUS { DEVICE_LIST }
//
//	Attribute              Type    Meaning
//	1 INDEX                u32     N of /dev/nbdN; absent in CONNECT: any free one
//	2 SIZE_BYTES           u64
//	3 BLOCK_SIZE_BYTES     u64     logical block size; 1024 when absent
//	4 TIMEOUT              u64     seconds until a request in flight is given up; 0 never
//	5 SERVER_FLAGS         u64     transmission flags of the protocol
//	6 CLIENT_FLAGS         u64     1 destroy on disconnect, 2 disconnect on last close; never sent
//	7 SOCKETS              nested  { 1 SOCK_ITEM nested { 1 FD u32 } ... }
//	8 DEAD_CONN_TIMEOUT    u64     seconds that requests wait for a new socket
//	9 DEVICE_LIST          nested  { 1 DEVICE_ITEM nested { 1 INDEX u32, 2 CONNECTED u8 } ... }
//	10 BACKEND_IDENTIFIER  string  NUL-terminated; shown in /sys/block/nbdN/backend
//
// Spec: Linux include/uapi/linux/nbd-netlink.h.
const (
	nbdFamilyName    = "nbd"
	nbdFamilyVersion = 1

	nbdCmdConnect     = 1
	nbdCmdDisconnect  = 2
	nbdCmdReconfigure = 3
	nbdCmdStatus      = 5

	nbdAttrIndex             = 1
	nbdAttrSizeBytes         = 2
	nbdAttrBlockSizeBytes    = 3
	nbdAttrTimeout           = 4
	nbdAttrServerFlags       = 5
	nbdAttrSockets           = 7
	nbdAttrDeadConnTimeout   = 8
	nbdAttrDeviceList        = 9
	nbdAttrBackendIdentifier = 10

	nbdSockItem        = 1
	nbdSockFD          = 1
	nbdDeviceItem      = 1
	nbdDeviceIndex     = 1
	nbdDeviceConnected = 2
)

// nbdAnyIndex lets the kernel choose: the lowest free index, a new device when there is none.
const nbdAnyIndex = math.MaxUint32

// An nbdConfig is what CONNECT tells the kernel.
type nbdConfig struct {
	Index           uint32 // or nbdAnyIndex
	Size            int64
	BlockSize       int
	Flags           TransmissionFlags
	DeadConnTimeout time.Duration // whole seconds
	Backend         string
}

// An nbdReconfig is what RECONFIGURE changes. The kernel compares the backend with what CONNECT gave
// before it does anything.
type nbdReconfig struct {
	nbdPlace

	// size, when not 0, is the new size. It must not be set while no server is connected: the
	// kernel freezes the queue for it, behind requests that wait for one.
	size int64

	// socket, when not -1, replaces one socket that the kernel has marked dead. When it has
	// marked none, the answer is success all the same and the descriptor is dropped: only
	// traffic on the new socket proves that it was taken.
	socket int

	// deadConnTimeout, when not 0, is set anew. TIMEOUT is never sent again: it would set
	// the queue's io_timeout back to 30 s.
	deadConnTimeout time.Duration
}

// nbdNetlink is a connection to the family. It is not for concurrent use.
type nbdNetlink struct {
	conn   *genetlink.Conn
	family genetlink.Family
}

// dialNBD connects to the family; it fails with fs.ErrNotExist when the kernel has none.
func dialNBD() (*nbdNetlink, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("dial generic netlink: %w", err)
	}
	family, err := conn.GetFamily(nbdFamilyName)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("netlink family %q: %w", nbdFamilyName, err), conn.Close())
	}
	return &nbdNetlink{conn: conn, family: family}, nil
}

func (n *nbdNetlink) close() error { return n.conn.Close() }

// connect makes a device over the descriptor socket and returns its index. The server must be serving
// the other end already: the kernel may read the device before it answers.
func (n *nbdNetlink) connect(c nbdConfig, socket int) (uint32, error) {
	ae := netlink.NewAttributeEncoder()
	if c.Index != nbdAnyIndex {
		ae.Uint32(nbdAttrIndex, c.Index)
	}
	ae.Uint64(nbdAttrSizeBytes, uint64(c.Size))
	ae.Uint64(nbdAttrBlockSizeBytes, uint64(c.BlockSize))
	ae.Uint64(nbdAttrTimeout, 0)
	ae.Uint64(nbdAttrServerFlags, uint64(c.Flags))
	ae.Uint64(nbdAttrDeadConnTimeout, uint64(c.DeadConnTimeout/time.Second))
	ae.String(nbdAttrBackendIdentifier, c.Backend)
	encodeSocket(ae, socket)
	// No acknowledgement is asked for: the answer is one.
	answer, err := n.execute(nbdCmdConnect, 0, ae)
	if err != nil {
		return 0, err
	}
	for _, m := range answer {
		ad, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, err
		}
		for ad.Next() {
			if ad.Type() == nbdAttrIndex {
				index := ad.Uint32()
				return index, ad.Err()
			}
		}
	}
	return 0, errors.New("nbd CONNECT: the answer has no index")
}

// disconnect tells the server that no more requests come and takes the device apart. What is still
// in flight fails.
func (n *nbdNetlink) disconnect(index uint32) error {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(nbdAttrIndex, index)
	_, err := n.execute(nbdCmdDisconnect, netlink.Acknowledge, ae)
	return err
}

// reconfigure changes a connected device.
func (n *nbdNetlink) reconfigure(r nbdReconfig) error {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(nbdAttrIndex, r.Index)
	ae.String(nbdAttrBackendIdentifier, r.Backend)
	if r.size != 0 {
		ae.Uint64(nbdAttrSizeBytes, uint64(r.size))
	}
	if r.deadConnTimeout != 0 {
		ae.Uint64(nbdAttrDeadConnTimeout, uint64(r.deadConnTimeout/time.Second))
	}
	if r.socket != -1 {
		encodeSocket(ae, r.socket)
	}
	_, err := n.execute(nbdCmdReconfigure, netlink.Acknowledge, ae)
	return err
}

// connected reports whether the device is configured. It stays so while sockets are dead, and after a
// disconnect for as long as someone has the device open.
func (n *nbdNetlink) connected(index uint32) (bool, error) {
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(nbdAttrIndex, index)
	answer, err := n.execute(nbdCmdStatus, 0, ae)
	if err != nil {
		return false, err
	}
	for _, m := range answer {
		if list, err := decodeDeviceList(m.Data); err != nil {
			return false, err
		} else if connected, ok := list[index]; ok {
			return connected, nil
		}
	}
	return false, fmt.Errorf("nbd STATUS: the answer does not name index %d", index)
}

func (n *nbdNetlink) execute(command uint8, flags netlink.HeaderFlags, ae *netlink.AttributeEncoder) ([]genetlink.Message, error) {
	data, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: nbdFamilyVersion}, Data: data}
	answer, err := n.conn.Execute(m, n.family.ID, netlink.Request|flags)
	if err != nil {
		return nil, fmt.Errorf("nbd netlink command %d: %w", command, err)
	}
	return answer, nil
}

func encodeSocket(ae *netlink.AttributeEncoder, fd int) {
	ae.Nested(nbdAttrSockets, func(ae *netlink.AttributeEncoder) error {
		ae.Nested(nbdSockItem, func(ae *netlink.AttributeEncoder) error {
			ae.Uint32(nbdSockFD, uint32(fd))
			return nil
		})
		return nil
	})
}

// decodeDeviceList returns which devices of a STATUS answer are connected, by index.
func decodeDeviceList(data []byte) (map[uint32]bool, error) {
	list := make(map[uint32]bool)
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return nil, err
	}
	for ad.Next() {
		if ad.Type() != nbdAttrDeviceList {
			continue
		}
		ad.Nested(func(items *netlink.AttributeDecoder) error {
			for items.Next() {
				if items.Type() != nbdDeviceItem {
					continue
				}
				items.Nested(func(item *netlink.AttributeDecoder) error {
					var index uint32
					var connected bool
					for item.Next() {
						switch item.Type() {
						case nbdDeviceIndex:
							index = item.Uint32()
						case nbdDeviceConnected:
							connected = item.Uint8() != 0
						}
					}
					list[index] = connected
					return nil
				})
			}
			return nil
		})
	}
	return list, ad.Err()
}
