package nbdexport

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"syscall"
	"testing"
)

func TestRequestBytes(t *testing.T) {
	r := request{cookie: 0x1122334455667788, off: 0x0102030405060708, n: 0x0a0b0c0d, cmd: cmdWriteZeroes, flags: flagFUA | flagNoHole}
	for _, tt := range []struct {
		name   string
		encode func([]byte)
		decode func([]byte) (request, error)
		want   string
	}{
		{"compact", r.encode, decodeRequest,
			"25609513" + "0003" + "0006" + "1122334455667788" + "0102030405060708" + "0a0b0c0d"},
		{"extended", r.encodeExtended, decodeRequestExtended,
			"21e41c71" + "0003" + "0006" + "1122334455667788" + "0102030405060708" + "000000000a0b0c0d"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := make([]byte, len(tt.want)/2)
			tt.encode(b)
			if got := fmt.Sprintf("%x", b); got != tt.want {
				t.Errorf("encoded %s: want %s", got, tt.want)
			}
			got, err := tt.decode(b)
			if err != nil || got != r {
				t.Errorf("decoded %v, %v: want %v", &got, err, &r)
			}
			b[3] ^= 1
			if _, err := tt.decode(b); !errors.Is(err, ErrProtocol) {
				t.Errorf("decode of a wrong magic: %v: want ErrProtocol", err)
			}
		})
	}
}

func TestReplyBytes(t *testing.T) {
	r := &request{cookie: 0x1122334455667788, off: 0x1000, n: 512}
	var simple, structured, extended terms
	structured.structured = true
	extended.structured, extended.extended = true, true
	const cookie = "1122334455667788"
	for _, tt := range []struct {
		name string
		got  []byte
		want string
	}{
		{"simple", simple.appendDone(nil, r), "67446698" + "00000000" + cookie},
		{"simple error", simple.appendError(nil, r, wireNOSPC, "full"), "67446698" + "0000001c" + cookie},
		{"done", structured.appendDone(nil, r), "668e33ef" + "0001" + "0000" + cookie + "00000000"},
		{"extended done", extended.appendDone(nil, r), "6e8a278c" + "0001" + "0000" + cookie + "0000000000001000" + "0000000000000000"},
		{"data", structured.appendDataHeader(nil, r, 0, 0x1000, 512), "668e33ef" + "0000" + "0001" + cookie + "00000208" + "0000000000001000"},
		{"extended data", extended.appendDataHeader(nil, r, chunkDone, 0x1000, 512),
			"6e8a278c" + "0001" + "0001" + cookie + "0000000000001000" + "0000000000000208" + "0000000000001000"},
		{"hole", structured.appendHole(nil, r, chunkDone, 0x1100, 256), "668e33ef" + "0001" + "0002" + cookie + "0000000c" + "0000000000001100" + "00000100"},
		{"error", structured.appendError(nil, r, wireIO, "bad"), "668e33ef" + "0001" + "8001" + cookie + "00000009" + "00000005" + "0003" + "626164"},
		{"block status", structured.appendBlockStatus(nil, r, chunkDone, 1, []statusExtent{{256, 3}, {256, 0}}),
			"668e33ef" + "0001" + "0005" + cookie + "00000014" + "00000001" + "00000100" + "00000003" + "00000100" + "00000000"},
		{"extended block status", extended.appendBlockStatus(nil, r, chunkDone, 2, []statusExtent{{1 << 33, 1}}),
			"6e8a278c" + "0001" + "0006" + cookie + "0000000000001000" + "0000000000000018" + "00000002" + "00000001" + "0000000200000000" + "0000000000000001"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := fmt.Sprintf("%x", tt.got); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestOptionRoundTrip(t *testing.T) {
	q := infoRequest{"name", []info{infoBlockSize, infoName}}
	if got, err := decodeInfoRequest(q.append(nil)); err != nil || !reflect.DeepEqual(got, q) {
		t.Errorf("info request: got %v, %v: want %v", got, err, q)
	}
	c := contextRequest{"name", []string{"base:allocation", ""}}
	if got, err := decodeContextRequest(c.append(nil)); err != nil || !reflect.DeepEqual(got, c) {
		t.Errorf("context request: got %v, %v: want %v", got, err, c)
	}
	head := decodeOptionHeader(appendOptionHeader(nil, optGo, 17))
	if want := (optionHeader{magicOption, optGo, 17}); head != want {
		t.Errorf("option header: got %v: want %v", head, want)
	}
	for n := range len(q.append(nil)) {
		if _, err := decodeInfoRequest(q.append(nil)[:n]); err == nil {
			t.Errorf("info request cut to %d bytes is accepted", n)
		}
	}
	for n := range len(c.append(nil)) {
		if _, err := decodeContextRequest(c.append(nil)[:n]); err == nil {
			t.Errorf("context request cut to %d bytes is accepted", n)
		}
	}
}

func TestWireErrorOf(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want wireError
	}{
		{nil, wireOK},
		{errors.New("no number"), wireIO},
		{&fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, wireNOSPC},
		{fmt.Errorf("two: %w", errors.Join(errors.New("first"), syscall.EDQUOT)), wireNOSPC},
		{syscall.EFBIG, wireNOSPC},
		{syscall.EROFS, wirePERM},
		{syscall.EACCES, wirePERM},
		{syscall.EPERM, wirePERM},
		{syscall.EINVAL, wireINVAL},
		{syscall.ENOMEM, wireNOMEM},
		{syscall.EOVERFLOW, wireOVERFLOW},
		{syscall.EOPNOTSUPP, wireNOTSUP},
		{syscall.ENOTSUP, wireNOTSUP},
		{syscall.ESHUTDOWN, wireSHUTDOWN},
		{syscall.EIO, wireIO},
		{syscall.EBADF, wireIO},
		{os.ErrClosed, wireIO},
	} {
		if got := wireErrorOf(tt.err); got != tt.want {
			t.Errorf("wireErrorOf(%v) = %d: want %d", tt.err, got, tt.want)
		}
	}
}

// TestNames checks that each constant of the protocol says its name.
func TestNames(t *testing.T) {
	for o := optExportName; o <= optExtendedHeaders; o++ {
		if _, ok := optionNames[o]; !ok {
			t.Errorf("option %d has no name", o)
		}
	}
	for c := cmdRead; c <= cmdBlockStatus; c++ {
		if _, ok := commandNames[c]; !ok {
			t.Errorf("command %d has no name", c)
		}
	}
	if got, want := (flagFUA | flagDF | 1<<15).String(), "FUA|DF|0x8000"; got != want {
		t.Errorf("flags: got %q: want %q", got, want)
	}
	if got, want := option(99).String(), "option 0x63"; got != want {
		t.Errorf("unknown option: got %q: want %q", got, want)
	}
}

func TestBufferAlignmentAndSize(t *testing.T) {
	for _, n := range []int{0, 1, 4096, 4097, 65536, 65537, 1 << 20, maxBuffer} {
		buf := newBuffer(n)
		if len(buf.b) < n {
			t.Errorf("buffer for %d bytes has %d", n, len(buf.b))
		}
		if addr := reflect.ValueOf(buf.b).Pointer(); addr%bufferAlign != 0 {
			t.Errorf("buffer for %d bytes is at %#x: want a multiple of %d", n, addr, bufferAlign)
		}
		buf.release()
	}
}
