// Command churn is the short-lived processes of TestNoProcessGetsAnothersIdentity
// and of its containers. Run without a command it is one of them: it fetches its
// X509-SVIDs once and prints their SPIFFE IDs, or the code of the refusal.
//
//	churn SOCKET            one process
//	churn leave SOCKET      connects, leaves the connection to a child, and ends
//	churn heir              speaks on the connection that it was left
//	churn swarm FILE        starts an agent and a great many of them; see swarm.go
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Got is what a process was given.
type Got struct {
	IDs  []string      // of its X509-SVIDs
	Code string        // of the refusal, if there was one
	Took time.Duration // from before it connected
}

// patience bounds every wait of one process.
const patience = 30 * time.Second

// Descriptors that a heir is left: the connection, and a pidfd of who made it.
const (
	inherited = 3
	testator  = 4
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "churn:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "swarm":
		return swarm(args[1])
	case len(args) == 2 && args[0] == "leave":
		return leave(args[1])
	case len(args) == 1 && args[0] == "heir":
		// As long as who connected lives, it is answered, whoever speaks.
		ended := []unix.PollFd{{Fd: testator, Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(ended, int(patience.Milliseconds()))
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				return fmt.Errorf("wait for the end of who connected: %d, %w", n, err)
			}
			break
		}
		file := os.NewFile(inherited, "inherited")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			return err
		}
		return show(fetch(func() (net.Conn, error) { return conn, nil }))
	case len(args) == 1:
		return show(fetch(func() (net.Conn, error) { return net.Dial("unix", args[0]) }))
	}
	return fmt.Errorf("arguments are %q", args)
}

func show(g Got) error { return json.NewEncoder(os.Stdout).Encode(g) }

// fetch asks once, on the first connection that dial makes and on no other.
func fetch(dial func() (net.Conn, error)) Got {
	started := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var once sync.Once
	client, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (conn net.Conn, err error) {
			err = net.ErrClosed
			once.Do(func() { conn, err = dial() })
			return conn, err
		}))
	if err != nil {
		return Got{Code: err.Error()}
	}
	defer client.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	var answer *workload.X509SVIDResponse
	stream, err := workload.NewSpiffeWorkloadAPIClient(client).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err == nil {
		answer, err = stream.Recv()
	}
	g := Got{Took: time.Since(started)}
	if err != nil {
		g.Code = status.Code(err).String()
		return g
	}
	for _, svid := range answer.Svids {
		g.IDs = append(g.IDs, svid.SpiffeId)
	}
	return g
}

// leave ends at once, so that its PID is free for another process while its
// connection lives on in a child.
func leave(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	file, err := conn.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return err
	}
	heir := exec.Command("/proc/self/exe", "heir")
	heir.ExtraFiles = []*os.File{file, os.NewFile(uintptr(self), "pidfd")}
	heir.Stdout, heir.Stderr = os.Stdout, os.Stderr
	return heir.Start()
}
