package nbdexport_test

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

func twoExports() []*nbdexport.Export {
	return []*nbdexport.Export{
		{Name: "disk", Description: "a disk", Backend: nbdtest.NewMemory(1 << 20)},
		{Name: "", Backend: nbdtest.NewMemory(2 << 20), ReadOnly: true},
	}
}

func TestHandshakeList(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	replies := c.MustOption(nbdtest.OptList, nil, nbdtest.RepAck)
	var got []string
	for _, r := range replies[:len(replies)-1] {
		if r.Type != nbdtest.RepServer {
			t.Fatalf("reply type %#x: want SERVER", r.Type)
		}
		n := binary.BigEndian.Uint32(r.Data)
		got = append(got, fmt.Sprintf("%s=%s", r.Data[4:4+n], r.Data[4+n:]))
	}
	if want := "[= disk=a disk]"; fmt.Sprint(got) != want {
		t.Errorf("got %v: want %v", got, want)
	}
	c.MustOption(nbdtest.OptList, []byte("x"), nbdtest.RepErrInvalid)
}

func TestHandshakeInfo(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	replies := c.MustOption(nbdtest.OptInfo, nbdtest.InfoData("disk", 3, 2, 1, 77, 1), nbdtest.RepAck)
	got := map[uint16]string{}
	for _, r := range replies[:len(replies)-1] {
		kind := binary.BigEndian.Uint16(r.Data)
		if _, ok := got[kind]; ok {
			t.Errorf("info %d twice", kind)
		}
		got[kind] = fmt.Sprintf("%x", r.Data[2:])
	}
	want := map[uint16]string{
		// size, then all flags but READ_ONLY, ROTATIONAL, RESIZE, and DF,
		// which needs structured replies
		0: "0000000000100000" + "0d6d",
		1: fmt.Sprintf("%x", "disk"),
		2: fmt.Sprintf("%x", "a disk"),
		3: "00000001" + "00001000" + "02000000",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	c.MustOption(nbdtest.OptInfo, nbdtest.InfoData("other"), nbdtest.RepErrUnknown)
	c.MustOption(nbdtest.OptGo, nbdtest.InfoData("other"), nbdtest.RepErrUnknown)
	c.MustOption(nbdtest.OptInfo, nil, nbdtest.RepErrInvalid)
	c.MustOption(nbdtest.OptInfo, append(nbdtest.InfoData("disk"), 0), nbdtest.RepErrInvalid)
}

func TestHandshakeReadOnlyFlags(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	size, flags := c.Start("", nbdtest.Structured)
	// HAS_FLAGS, READ_ONLY, FLUSH, FUA, DF, MULTI_CONN, CACHE
	if size != 2<<20 || flags != 0x58f {
		t.Errorf("size %d, flags %#x: want %d, %#x", size, flags, 2<<20, 0x58f)
	}
}

func TestHandshakeExportName(t *testing.T) {
	for _, tt := range []struct {
		clientFlags uint32
		padding     int
	}{{3, 0}, {1, 124}, {0, 124}} {
		t.Run(fmt.Sprint("flags ", tt.clientFlags), func(t *testing.T) {
			c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
			c.Greet(tt.clientFlags)
			c.SendOption(nbdtest.OptExportName, []byte("disk"))
			b := c.Read(10 + tt.padding)
			if size := binary.BigEndian.Uint64(b); size != 1<<20 {
				t.Errorf("size %d: want %d", size, 1<<20)
			}
			for _, z := range b[10:] {
				if z != 0 {
					t.Fatalf("padding %x: want zeroes", b[10:])
				}
			}
			if r := c.Do(nbdtest.Request{Type: nbdtest.CmdFlush, Cookie: 5}); r.Err != 0 {
				t.Errorf("flush: %v", r.Err)
			}
		})
	}
}

func TestHandshakeExportNameUnknown(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	c.SendOption(nbdtest.OptExportName, []byte("other"))
	c.ExpectClosed()
}

func TestHandshakeAbort(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	c.MustOption(nbdtest.OptAbort, nil, nbdtest.RepAck)
	c.ExpectClosed()
}

func TestHandshakeStartTLSIsRefused(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	c.MustOption(nbdtest.OptStartTLS, nil, nbdtest.RepErrPolicy)
	c.MustOption(nbdtest.OptGo, nbdtest.InfoData("disk"), nbdtest.RepAck)
}

func TestHandshakeUnknownOption(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	c.MustOption(nbdtest.OptPeekExport, []byte("any data"), nbdtest.RepErrUnsupported)
	c.MustOption(0xfffffff, make([]byte, 64<<10), nbdtest.RepErrUnsupported)
	c.MustOption(nbdtest.OptGo, nbdtest.InfoData("disk"), nbdtest.RepAck)
}

func TestHandshakeStructuredReplyTwice(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	c.MustOption(nbdtest.OptStructuredReply, []byte("x"), nbdtest.RepErrInvalid)
	c.MustOption(nbdtest.OptStructuredReply, nil, nbdtest.RepAck)
	c.MustOption(nbdtest.OptStructuredReply, nil, nbdtest.RepErrInvalid)
	c.MustOption(nbdtest.OptExtendedHeaders, nil, nbdtest.RepAck)
	c.MustOption(nbdtest.OptExtendedHeaders, nil, nbdtest.RepErrInvalid)
	c.MustOption(nbdtest.OptStructuredReply, nil, nbdtest.RepErrExtHeaderReqd)
}

func TestHandshakeContexts(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	c.MustOption(nbdtest.OptSetMetaContext, nbdtest.ContextData("disk", "base:allocation"), nbdtest.RepErrInvalid)
	c.MustOption(nbdtest.OptStructuredReply, nil, nbdtest.RepAck)
	const allocation, depth = "base:allocation", "qemu:allocation-depth"
	for _, tt := range []struct {
		option  uint32
		queries []string
		want    []string
	}{
		{nbdtest.OptListMetaContext, nil, []string{"0 " + allocation, "0 " + depth}},
		{nbdtest.OptListMetaContext, []string{"base:"}, []string{"0 " + allocation}},
		{nbdtest.OptListMetaContext, []string{"qemu:"}, []string{"0 " + depth}},
		{nbdtest.OptListMetaContext, []string{depth, "x-other:y"}, []string{"0 " + depth}},
		{nbdtest.OptListMetaContext, []string{"base:other", ""}, nil},
		{nbdtest.OptSetMetaContext, nil, nil},
		{nbdtest.OptSetMetaContext, []string{"base:"}, nil},
		{nbdtest.OptSetMetaContext, []string{depth}, []string{"2 " + depth}},
		{nbdtest.OptSetMetaContext, []string{depth, allocation, depth}, []string{"1 " + allocation, "2 " + depth}},
	} {
		var got []string
		replies := c.MustOption(tt.option, nbdtest.ContextData("disk", tt.queries...), nbdtest.RepAck)
		for _, r := range replies[:len(replies)-1] {
			got = append(got, fmt.Sprint(binary.BigEndian.Uint32(r.Data), " ", string(r.Data[4:])))
		}
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("option %d %q: got %q: want %q", tt.option, tt.queries, got, tt.want)
		}
	}
	c.MustOption(nbdtest.OptSetMetaContext, nbdtest.ContextData("other", allocation), nbdtest.RepErrUnknown)
	c.MustOption(nbdtest.OptSetMetaContext, []byte{0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, nbdtest.RepErrInvalid)
	c.MustOption(nbdtest.OptSetMetaContext, nbdtest.ContextData("disk", strings.Repeat("q", 4097)), nbdtest.RepErrTooBig)
}

// TestHandshakeContextsOfAnotherExport checks that a selection does not
// outlive the choice of another export.
func TestHandshakeContextsOfAnotherExport(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, twoExports()...).client()
	c.Greet(3)
	c.MustOption(nbdtest.OptStructuredReply, nil, nbdtest.RepAck)
	c.Structured = true
	c.MustOption(nbdtest.OptSetMetaContext, nbdtest.ContextData("", "base:allocation"), nbdtest.RepAck)
	c.MustOption(nbdtest.OptGo, nbdtest.InfoData("disk"), nbdtest.RepAck)
	r := c.Do(nbdtest.Request{Type: nbdtest.CmdBlockStatus, Len: 4096})
	if r.Err == 0 {
		t.Errorf("block status with a context of another export succeeds: %v", r.Extents)
	}
}
