package etcd

import (
	"crypto/tls"
	"fmt"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// Cluster is one that runs by itself.
type Cluster struct {
	Endpoints []string // https://host:port
	// CA is the file of the certificates that its servers' are verified with.
	CA string
	// Cert and Key are the files of our certificate for it. They are read again
	// for each connection, so that they may be replaced.
	Cert, Key string
}

// A connection over which nothing comes back is given up after both of them.
const (
	aliveEvery = 5 * time.Second
	aliveWait  = 3 * time.Second
)

// Dial makes a client of a cluster. It connects when it is used.
func Dial(c Cluster) (*clientv3.Client, error) {
	files := transport.TLSInfo{TrustedCAFile: c.CA, CertFile: c.Cert, KeyFile: c.Key, Logger: zap.NewNop()}
	conf, err := files.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read the certificates for etcd: %w", err)
	}
	conf.MinVersion = tls.VersionTLS12
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            c.Endpoints,
		TLS:                  conf,
		DialKeepAliveTime:    aliveEvery,
		DialKeepAliveTimeout: aliveWait,
		PermitWithoutStream:  true,
		Logger:               zap.NewNop(), // what goes wrong is returned
	})
	if err != nil {
		return nil, fmt.Errorf("connect to etcd: %w", err)
	}
	return client, nil
}
