package aside

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
)

// childName is the name under which a program starts itself to make a call.
const childName = "csi-qcow2-aside"

// firstFile is the first descriptor that a child is given beyond the standard ones.
const firstFile = 3

var (
	operations = make(map[string]func(call) reply) // by name; complete before main begins
	able       bool                                // this program's main calls Main
)

// A call is what a child is told, as its second argument.
type call struct {
	In    json.RawMessage
	Files int // passed descriptors, from firstFile on
}

// A reply is what a child prints.
type reply struct {
	Out       json.RawMessage
	Error     string        // "" for none
	Errno     syscall.Errno // in the error, 0 for none
	Sentinels []int         // of the operation's, those that the error matches
}

// An Error is the error of a call that a child has made.
type Error struct {
	text  string
	under []error // errno and sentinels
}

func (e *Error) Error() string   { return e.text }
func (e *Error) Unwrap() []error { return e.under }

// Main makes the call for which this process was started, if it was, and says with which status the process
// shall end then. Where child is false, the process makes its calls by children from then on. It is for
// the beginning of main.
func Main() (status int, child bool) {
	able = true
	if os.Args[0] != childName {
		return 0, false
	}
	if err := serve(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1, true
	}
	return 0, true
}

// serve makes the call that args describe and prints its reply.
func serve(args []string) error {
	if len(args) != 2 || operations[args[0]] == nil {
		return fmt.Errorf("aside: no operation %q", args)
	}
	var c call
	if err := json.Unmarshal([]byte(args[1]), &c); err != nil {
		return fmt.Errorf("aside: %s: %w", args[0], err)
	}
	return json.NewEncoder(os.Stdout).Encode(operations[args[0]](c))
}

// Op makes fn an operation. The function that it returns calls fn, in a child if this program can be its own;
// in and the result go through JSON then. Descriptors of files are lent for the call. Errors match
// sentinels and errnos as those of fn do. Op is for the initialisation of package variables.
func Op[In, Out any](name string, fn func(in In, files []*os.File) (Out, error), sentinels ...error) func(context.Context, In, ...*os.File) (Out, error) {
	operations[name] = func(c call) reply {
		var in In
		if err := json.Unmarshal(c.In, &in); err != nil {
			return reply{Error: err.Error()}
		}
		files := make([]*os.File, c.Files)
		for i := range files {
			syscall.CloseOnExec(firstFile + i) // for programs that fn starts
			files[i] = os.NewFile(uintptr(firstFile+i), "passed")
		}
		out, err := fn(in, files)
		return replyOf(out, err, sentinels)
	}
	return func(ctx context.Context, in In, files ...*os.File) (out Out, err error) {
		if !able {
			return fn(in, files)
		}
		r, err := runChild(ctx, name, in, files)
		if err != nil {
			return out, fmt.Errorf("%s in a process of its own: %w", name, err)
		}
		if err := json.Unmarshal(r.Out, &out); err != nil {
			return out, fmt.Errorf("%s in a process of its own: %w", name, err)
		}
		return out, r.err(sentinels)
	}
}

func replyOf(out any, err error, sentinels []error) reply {
	var r reply
	var encodeErr error
	if r.Out, encodeErr = json.Marshal(out); encodeErr != nil {
		return reply{Out: []byte("null"), Error: encodeErr.Error()}
	}
	if err == nil {
		return r
	}
	r.Error = err.Error()
	errors.As(err, &r.Errno)
	for i, s := range sentinels {
		if errors.Is(err, s) {
			r.Sentinels = append(r.Sentinels, i)
		}
	}
	return r
}

// err is the error of r.
func (r reply) err(sentinels []error) error {
	if r.Error == "" {
		return nil
	}
	e := &Error{text: r.Error}
	if r.Errno != 0 {
		e.under = append(e.under, r.Errno)
	}
	for _, i := range r.Sentinels {
		if i >= 0 && i < len(sentinels) {
			e.under = append(e.under, sentinels[i])
		}
	}
	return e
}

// runChild makes a call by a child and waits for it, or for the end of ctx.
func runChild(ctx context.Context, name string, in any, files []*os.File) (reply, error) {
	arg, err := json.Marshal(in)
	if err == nil {
		arg, err = json.Marshal(call{In: arg, Files: len(files)})
	}
	if err != nil {
		return reply{}, err
	}
	type outcome struct {
		reply reply
		err   error
	}
	done := make(chan outcome, 1)
	started := make(chan struct{})
	go func() { // ends with the child
		// The child is killed when this thread dies, which does not outlive the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		var o outcome
		o.reply, o.err = execute(name, string(arg), files, started)
		done <- o
	}()
	<-started // the caller has its descriptors back
	select {
	case o := <-done:
		return o.reply, o.err
	case <-ctx.Done():
		return reply{}, ctx.Err()
	}
}

// execute runs a child; it closes started when the child has been started, or could not be.
func execute(name, arg string, files []*os.File, started chan<- struct{}) (r reply, err error) {
	cmd := &exec.Cmd{
		Path:       "/proc/self/exe", // the program that runs, even when another has its name by now
		Args:       []string{childName, name, arg},
		Env:        []string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=1"},
		ExtraFiles: files,
		SysProcAttr: &syscall.SysProcAttr{
			Pdeathsig: syscall.SIGKILL,
			Setpgid:   true, // what a terminal sends is for the parent
		},
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Start()
	close(started)
	if err != nil {
		return reply{}, err
	}
	if err := cmd.Wait(); err != nil {
		return reply{}, fmt.Errorf("%w: %s", err, strings.TrimSpace(errs.String()))
	}
	return r, json.Unmarshal(out.Bytes(), &r)
}
