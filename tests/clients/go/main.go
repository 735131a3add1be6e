// Makes an arena, writes standard input to it, shares it, and reads it to standard output.
// Usage: client ADDRESS ARENA
package main

import (
	"context"
	"io"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"samepage.example/client/pb"
)

const chunkBytes = 1 << 20

func main() {
	conn, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	arenas, name, ctx := pb.NewArenasClient(conn), os.Args[2], context.Background()
	data, err := io.ReadAll(os.Stdin)
	check(err)

	_, err = arenas.CreateArena(ctx, &pb.CreateArenaRequest{Arena: name, Size: uint64(len(data))})
	check(err)
	stream, err := arenas.WriteArena(ctx)
	check(err)
	target := &pb.WriteArenaRequest_Target{Target: &pb.WriteTarget{Arena: name}}
	err = stream.Send(&pb.WriteArenaRequest{Kind: target})
	for at := 0; at < len(data) && err == nil; at += chunkBytes {
		part := &pb.WriteChunk{Offset: uint64(at), Data: data[at:min(at+chunkBytes, len(data))]}
		err = stream.Send(&pb.WriteArenaRequest{Kind: &pb.WriteArenaRequest_Chunk{Chunk: part}})
	}
	written, err := stream.CloseAndRecv() // says also why a Send failed
	check(err)
	shared, err := arenas.ShareArena(ctx, &pb.ShareArenaRequest{Arena: name})
	check(err)
	log.Printf("%d bytes written, %d pages shared", written.WrittenBytes, shared.Outcome.Shared)

	chunks, err := arenas.ReadArena(ctx, &pb.ReadArenaRequest{Arena: name})
	check(err)
	for part, err := chunks.Recv(); err != io.EOF; part, err = chunks.Recv() {
		check(err)
		os.Stdout.Write(part.Data)
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
