package awsiid

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/hallmark-id/hallmark/attestors/cloud"
)

const (
	sessionHeader = "X-aws-ec2-metadata-token"
	sessionTTL    = "X-aws-ec2-metadata-token-ttl-seconds"
	sessionTime   = "60" // seconds
	maxSession    = 4 << 10
)

// imds is an instance's metadata service, version 2. Version 1, which anybody
// could ask who can make a server on the instance fetch a URL, is never asked.
type imds struct{ service *cloud.Service }

// session begins one: what it returns goes with each question.
func (s imds) session(ctx context.Context) (string, error) {
	answer, err := s.service.Do(ctx, cloud.Question{
		Method: http.MethodPut, URL: "/latest/api/token",
		Header: map[string]string{sessionTTL: sessionTime}, Most: maxSession,
	})
	if err != nil {
		return "", fmt.Errorf("begin a session of IMDSv2: %w; is this an EC2 instance, and its metadata hop limit 2 if the agent is in a container?", err)
	}
	token, err := cloud.Token(answer.Body)
	if err != nil {
		return "", fmt.Errorf("begin a session of IMDSv2: %w", err)
	}
	return token, nil
}

func (s imds) get(ctx context.Context, session, path string, most int64) (string, error) {
	answer, err := s.service.Do(ctx, cloud.Question{URL: path, Header: map[string]string{sessionHeader: session}, Most: most})
	if err != nil {
		return "", err
	}
	if len(answer.Body) == 0 {
		return "", errors.New("the metadata service answered with nothing")
	}
	return string(answer.Body), nil
}
