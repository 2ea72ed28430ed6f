package nbdexport

import (
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// fakeNBD is a connection to a family whose kernel side is fn.
func fakeNBD(t *testing.T, fn genltest.Func) *nbdNetlink {
	t.Helper()
	n := &nbdNetlink{conn: genltest.Dial(fn), family: genetlink.Family{ID: 0x20, Version: 1, Name: nbdFamilyName}}
	t.Cleanup(func() { n.close() })
	return n
}

// attributes encodes a list of attributes.
func attributes(t *testing.T, f func(*netlink.AttributeEncoder)) []byte {
	t.Helper()
	ae := netlink.NewAttributeEncoder()
	f(ae)
	b, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestNBDRequests compares each request with the bytes that the kernel's nla_policy takes. Numbers
// are in host order: the golden bytes are of a little-endian machine.
func TestNBDRequests(t *testing.T) {
	for _, tt := range []struct {
		name    string
		call    func(*nbdNetlink) error
		command uint8
		ack     bool
		want    []string // one attribute each
	}{
		{
			name: "CONNECT",
			call: func(n *nbdNetlink) error {
				_, err := n.connect(nbdConfig{Index: nbdAnyIndex, Size: 1 << 30, BlockSize: 512, Flags: FlagHasFlags | FlagSendFlush,
					DeadConnTimeout: 300 * time.Second, Backend: "v.1"}, 7)
				return err
			},
			command: 1,
			want: []string{
				"0c00 0200 0000004000000000",             // SIZE_BYTES
				"0c00 0300 0002000000000000",             // BLOCK_SIZE_BYTES
				"0c00 0400 0000000000000000",             // TIMEOUT
				"0c00 0500 0500000000000000",             // SERVER_FLAGS
				"0c00 0800 2c01000000000000",             // DEAD_CONN_TIMEOUT
				"0800 0a00 762e3100",                     // BACKEND_IDENTIFIER
				"1000 0780 0c00 0180 0800 0100 07000000", // SOCKETS { ITEM { FD } }
			},
		},
		{
			name:    "DISCONNECT",
			call:    func(n *nbdNetlink) error { return n.disconnect(3) },
			command: 2,
			ack:     true,
			want:    []string{"0800 0100 03000000"},
		},
		{
			name: "RECONFIGURE with a size",
			call: func(n *nbdNetlink) error {
				return n.reconfigure(nbdReconfig{nbdPlace: nbdPlace{3, "v.1"}, size: 1 << 20, socket: -1})
			},
			command: 3,
			ack:     true,
			want:    []string{"0800 0100 03000000", "0800 0a00 762e3100", "0c00 0200 0000100000000000"},
		},
		{
			name: "RECONFIGURE with a socket: neither SIZE nor TIMEOUT",
			call: func(n *nbdNetlink) error {
				return n.reconfigure(nbdReconfig{nbdPlace: nbdPlace{3, "v.1"}, socket: 7, deadConnTimeout: 300 * time.Second})
			},
			command: 3,
			ack:     true,
			want:    []string{"0800 0100 03000000", "0800 0a00 762e3100", "0c00 0800 2c01000000000000", "1000 0780 0c00 0180 0800 0100 07000000"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := fakeNBD(t, func(g genetlink.Message, m netlink.Message) ([]genetlink.Message, error) {
				if g.Header.Command != tt.command || g.Header.Version != 1 {
					t.Errorf("command %d version %d, want %d version 1", g.Header.Command, g.Header.Version, tt.command)
				}
				if got := m.Header.Flags&netlink.Acknowledge != 0; got != tt.ack {
					t.Errorf("acknowledgement asked for: %v, want %v", got, tt.ack)
				}
				want := strings.ReplaceAll(strings.Join(tt.want, ""), " ", "")
				if got := hex.EncodeToString(g.Data); got != want {
					t.Errorf("attributes\n got %s\nwant %s", got, want)
				}
				answer := attributes(t, func(ae *netlink.AttributeEncoder) { ae.Uint32(nbdAttrIndex, 9) })
				return []genetlink.Message{{Header: g.Header, Data: answer}}, nil
			})
			if err := tt.call(n); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestNBDAnswers checks what is made of the kernel's answers, wrong ones among them.
func TestNBDAnswers(t *testing.T) {
	index := attributes(t, func(ae *netlink.AttributeEncoder) { ae.Uint32(nbdAttrIndex, 9) })
	list := attributes(t, func(ae *netlink.AttributeEncoder) {
		ae.Nested(nbdAttrDeviceList, func(ae *netlink.AttributeEncoder) error {
			for i := range uint32(2) {
				ae.Nested(nbdDeviceItem, func(ae *netlink.AttributeEncoder) error {
					ae.Uint32(nbdDeviceIndex, i)
					ae.Uint8(nbdDeviceConnected, uint8(i))
					return nil
				})
			}
			return nil
		})
	})
	answering := func(data []byte) *nbdNetlink {
		return fakeNBD(t, func(g genetlink.Message, _ netlink.Message) ([]genetlink.Message, error) {
			return []genetlink.Message{{Header: g.Header, Data: data}}, nil
		})
	}
	if got, err := answering(index).connect(nbdConfig{Index: nbdAnyIndex}, 0); got != 9 || err != nil {
		t.Errorf("CONNECT: index %d, %v; want 9", got, err)
	}
	for i, want := range []bool{false, true} {
		if got, err := answering(list).connected(uint32(i)); got != want || err != nil {
			t.Errorf("STATUS of %d: %v, %v; want %v", i, got, err, want)
		}
	}
	if _, err := answering(list).connected(2); err == nil {
		t.Error("STATUS of a device that is not in the answer: no error")
	}
	if _, err := answering(nil).connect(nbdConfig{}, 0); err == nil {
		t.Error("CONNECT with an empty answer: no error")
	}
	cut := slices.Clone(index)
	cut[0] = 200 // the length of the attribute is beyond the end
	if _, err := answering(cut).connect(nbdConfig{}, 0); err == nil {
		t.Error("CONNECT with a cut answer: no error")
	}
	silent := fakeNBD(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) { return nil, io.EOF })
	if _, err := silent.connect(nbdConfig{}, 0); err == nil {
		t.Error("CONNECT without an answer: no error")
	}
	refusing := fakeNBD(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.EBUSY))
	})
	if err := refusing.disconnect(1); !errors.Is(err, unix.EBUSY) {
		t.Errorf("DISCONNECT refused by the kernel: %v, want EBUSY", err)
	}
}
