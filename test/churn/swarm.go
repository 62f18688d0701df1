package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Swarm is what the command swarm is told. It is run as the first process of a
// PID namespace of its own.
type Swarm struct {
	Agent  []string // the command that runs the agent
	Health []string // the command that succeeds once it serves
	Socket string   // its Workload API
	Kinds  []Kind
	Count  int // processes in all
	AtOnce int // of them
}

// Kind is one kind of process: a program run by a user. Each has an identity of
// its own, or none.
type Kind struct {
	Program string // a copy of this one
	UID     uint32
}

// One is a process that was run.
type One struct {
	Kind int  // in Swarm.Kinds
	Left bool // it spoke on the connection of a process that had ended
	PID  int  // of the process that connected
	Got  Got
}

// lastPID is what the kernel counts PIDs from, in this PID namespace alone
// (proc_sys_kernel(5)). Setting it back makes it give the same ones again at
// once, as they would be given again after all others were used up.
const lastPID = "/proc/sys/kernel/ns_last_pid"

// swarm runs an agent and processes, and prints a JSON array of [One].
func swarm(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var s Swarm
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	agent := exec.Command(s.Agent[0], s.Agent[1:]...)
	agent.Stdout, agent.Stderr = os.Stderr, os.Stderr
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := agent.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- agent.Wait() }()
	for started := time.Now(); exec.Command(s.Health[0], s.Health[1:]...).Run() != nil; time.Sleep(20 * time.Millisecond) {
		select {
		case err := <-ended:
			return fmt.Errorf("the agent ended: %w", err)
		default:
		}
		if time.Since(started) > patience {
			return errors.New("the agent does not become healthy")
		}
	}
	first, err := os.ReadFile(lastPID)
	if err != nil {
		return err
	}

	ran := make([]One, s.Count)
	errs := make([]error, s.AtOnce)
	work := make(chan int)
	var workers sync.WaitGroup
	for w := range s.AtOnce {
		workers.Go(func() {
			for i := range work {
				if errs[w] == nil {
					ran[i], errs[w] = s.one(i, first)
				}
			}
		})
	}
	for i := range s.Count {
		work <- i
	}
	close(work)
	workers.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := <-ended; err != nil {
		return fmt.Errorf("the agent ended: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(ran)
}

// leaveEach is how often a process leaves its connection to a child.
const leaveEach = 4

func (s *Swarm) one(i int, first []byte) (One, error) {
	o := One{Kind: i % len(s.Kinds), Left: i/len(s.Kinds)%leaveEach == 0}
	kind := s.Kinds[o.Kind]
	args := []string{s.Socket}
	if o.Left {
		args = []string{"leave", s.Socket}
	}
	var out, stderr bytes.Buffer
	cmd := exec.Command(kind.Program, args...)
	cmd.Dir, cmd.Env = "/", []string{"GOMAXPROCS=1"}
	cmd.Stdout, cmd.Stderr = &out, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: kind.UID, Gid: kind.UID}}
	if err := os.WriteFile(lastPID, first, 0); err != nil {
		return o, err
	}
	if err := cmd.Start(); err != nil {
		return o, err
	}
	o.PID = cmd.Process.Pid
	// It returns once nobody holds the output any more: a heir, too, has ended.
	if err := cmd.Wait(); err != nil {
		return o, fmt.Errorf("%s %s: %w: %s", kind.Program, strconv.Quote(args[0]), err, stderr.Bytes())
	}
	if err := json.Unmarshal(out.Bytes(), &o.Got); err != nil {
		return o, fmt.Errorf("%s printed %q, %q: %w", kind.Program, out.Bytes(), stderr.Bytes(), err)
	}
	return o, nil
}
